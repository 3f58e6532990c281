//! What can be asked of `gpusnap`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use snapshot::parse_size;

use crate::units::parse_age;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; the line on standard error says at what, and what to do
  2    not a command line that is understood
  3    there is no such snapshot, here or in the registry
  4    something is damaged
  5    the snapshot is in use
  130  interrupted";

/// Looks at, checks, removes and moves snapshots of containers with their GPU state.
///
/// Snapshots are in a store on this node, an OCI image layout. One is named NAMESPACE/NAME, or
/// NAMESPACE/KUBERNETES-NAMESPACE/NAME if it is of a pod; NAME alone means the namespace of --namespace. Its digest, or the
/// first digits of it (six at least), will do as well.
#[derive(Debug, Parser)]
#[command(name = "gpusnap", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// The store.
    #[arg(long, global = true, env = "GPUSNAP_STORE", default_value = snapshot::DEFAULT_ROOT, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) store: PathBuf,
    /// The containerd namespace of names without one.
    #[arg(short, long, global = true, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    pub(crate) namespace: String,
    /// No progress, and no word when all is well.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List snapshots, and what they take.
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        format: Format,
    },
    /// Tell what is in a snapshot: processes, GPUs, sizes, sharing, and how long each step took.
    Inspect {
        /// Which.
        snapshot: String,
        #[command(flatten)]
        format: Format,
    },
    /// Read every byte of snapshots, or of all, and tell what is damaged.
    Verify {
        /// Which; all of the store if none is given.
        snapshots: Vec<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Remove snapshots, and what no other one shares with them. Of several names of a snapshot, only the given one.
    Rm {
        /// Which.
        #[arg(required = true)]
        snapshots: Vec<String>,
        /// Wait for a snapshot that is in use.
        #[arg(long)]
        wait: bool,
    },
    /// Remove what nothing needs: drafts and transfers that were given up, and blobs that no snapshot has.
    Prune {
        /// Snapshots without a name as well that were not used for so long.
        #[arg(long, value_name = "AGE", value_parser = parse_age)]
        unnamed: Option<Duration>,
        /// Spare blobs and transfers that are younger: another program may be at them.
        #[arg(long, value_name = "AGE", value_parser = parse_age, default_value = "1h")]
        grace: Duration,
        /// Snapshots that were not used for the longest time as well, until the rest is no more than this.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        quota: Option<u64>,
    },
    /// Give a snapshot a further name. A snapshot that has the name loses it.
    Tag {
        /// Which.
        snapshot: String,
        /// The further name.
        name: String,
    },
    /// Send a snapshot to a registry. What is there already is not sent.
    Push {
        /// Which.
        snapshot: String,
        /// HOST[:PORT]/REPOSITORY[:TAG].
        target: String,
        #[command(flatten)]
        transfer: Transfer,
    },
    /// Fetch a snapshot from a registry. What is here already is not fetched, even of a pull that was broken off.
    Pull {
        /// HOST[:PORT]/REPOSITORY[:TAG], or @DIGEST instead of the tag.
        target: String,
        /// Its name here; the last part of REPOSITORY if none is given. A snapshot that has the name loses it.
        name: Option<String>,
        /// The most that the store may take: less recently used snapshots make room, and a larger one is not begun.
        #[arg(long, value_name = "SIZE", value_parser = parse_size, env = "GPUSNAP_QUOTA")]
        quota: Option<u64>,
        #[command(flatten)]
        transfer: Transfer,
    },
    /// Write a snapshot into a file: a tar archive of an OCI image layout.
    Export {
        /// Which.
        snapshot: String,
        /// The file; it must not be there yet. Standard output if none is given.
        #[arg(value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
    },
    /// Take a snapshot out of a file that `export` wrote.
    Import {
        /// The file; standard input if it is -.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Its name here; the one in the file if none is given. A snapshot that has the name loses it.
        name: Option<String>,
    },
    /// Write the completion of a shell to standard output.
    Completion {
        /// Which shell.
        shell: Shell,
    },
    /// Write the manual pages into a folder, or the first one to standard output.
    Man {
        /// The folder.
        #[arg(value_hint = ValueHint::DirPath)]
        folder: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Format {
    /// JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Transfer {
    /// Blobs moved at a time.
    #[arg(short, long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) jobs: u16,
    /// Without TLS. This machine's own registries are spoken to without it anyway.
    #[arg(long)]
    pub(crate) plain_http: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_and_ages_are_understood_and_nonsense_is_not() {
        let parse = |line: &str| Arguments::try_parse_from(line.split(' '));
        let Command::Prune { unnamed, quota, .. } = parse("gpusnap prune --unnamed 7d --quota 1.5T").unwrap().command
        else {
            panic!()
        };
        assert_eq!((unnamed, quota), (Some(Duration::from_secs(7 * 86_400)), Some(1_500_000_000_000)));
        for line in
            ["prune --quota -1", "prune --quota x", "prune --unnamed 7", "rm", "push vit", "pull", "pull x -j 0"]
        {
            assert!(parse(&format!("gpusnap {line}")).is_err(), "{line}");
        }
    }
}
