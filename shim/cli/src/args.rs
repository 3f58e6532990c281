//! The command line of `gpusnap`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use snapshot::parse_size;

use crate::units::parse_age;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; standard error has one line with the cause and the remedy
  2    invalid usage
  3    no such snapshot, here or in the registry
  4    damaged data
  5    the snapshot is in use
  130  interrupted";

/// Lists, verifies, removes and moves snapshots of containers with their GPU state.
///
/// Snapshots are in a store on this node, an OCI image layout. A snapshot is named NAMESPACE/NAME,
/// or NAMESPACE/KUBERNETES-NAMESPACE/NAME for a pod's; NAME alone means the namespace of
/// --namespace. The snapshot's digest, or the first digits of the digest (six at least), serve as
/// well.
#[derive(Debug, Parser)]
#[command(name = "gpusnap", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// The store's folder.
    #[arg(long, global = true, env = "GPUSNAP_STORE", default_value = snapshot::DEFAULT_ROOT, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) store: PathBuf,
    /// The containerd namespace of names without a namespace.
    #[arg(short, long, global = true, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    pub(crate) namespace: String,
    /// Print no progress, and nothing on success.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List snapshots and their sizes.
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        format: Format,
    },
    /// Show a snapshot: processes, GPUs, sizes, sharing, and the duration of each step.
    Inspect {
        /// Snapshot name or digest.
        snapshot: String,
        #[command(flatten)]
        format: Format,
    },
    /// Read every byte of some or all snapshots, and report damage.
    Verify {
        /// Snapshot names or digests; the whole store if none is given.
        snapshots: Vec<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Remove snapshots, and all blobs that no other snapshot shares. If a snapshot has several
    /// names, only the given name goes.
    Rm {
        /// Snapshot names or digests.
        #[arg(required = true)]
        snapshots: Vec<String>,
        /// Wait for the end of a snapshot's use.
        #[arg(long)]
        wait: bool,
    },
    /// Remove garbage: abandoned drafts and transfers, and blobs without a snapshot.
    Prune {
        /// Also remove unnamed snapshots not used for this long.
        #[arg(long, value_name = "AGE", value_parser = parse_age)]
        unnamed: Option<Duration>,
        /// Spare younger blobs and transfers: another program may be writing them.
        #[arg(long, value_name = "AGE", value_parser = parse_age, default_value = "1h")]
        grace: Duration,
        /// Also remove the least recently used snapshots, until the rest is at most this large.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        quota: Option<u64>,
    },
    /// Give a snapshot a further name. Another snapshot with this name loses the name.
    Tag {
        /// Snapshot name or digest.
        snapshot: String,
        /// The further name.
        name: String,
    },
    /// Send a snapshot to a registry; blobs that the registry has are skipped.
    Push {
        /// Snapshot name or digest.
        snapshot: String,
        /// HOST[:PORT]/REPOSITORY[:TAG].
        target: String,
        #[command(flatten)]
        transfer: Transfer,
    },
    /// Fetch a snapshot from a registry. Resumes an interrupted pull; blobs in the store are
    /// skipped.
    Pull {
        /// HOST[:PORT]/REPOSITORY[:TAG], or @DIGEST instead of the tag.
        target: String,
        /// The name in the store; by default the last part of REPOSITORY. Another snapshot with
        /// this name loses the name.
        name: Option<String>,
        /// The largest size of the store: less recently used snapshots make room, and a larger
        /// snapshot is not begun.
        #[arg(long, value_name = "SIZE", value_parser = parse_size, env = "GPUSNAP_QUOTA")]
        quota: Option<u64>,
        #[command(flatten)]
        transfer: Transfer,
    },
    /// Write a snapshot into a file: a tar archive of an OCI image layout.
    Export {
        /// Snapshot name or digest.
        snapshot: String,
        /// The file, which must not exist; by default standard output.
        #[arg(value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
    },
    /// Read a snapshot from a file written by `export`.
    Import {
        /// The file, or - for standard input.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The name in the store; by default the name in the file. Another snapshot with this name
        /// loses the name.
        name: Option<String>,
    },
    /// Write a shell's completion script to standard output.
    Completion {
        /// The shell.
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
    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Transfer {
    /// Blobs moved at a time.
    #[arg(short, long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) jobs: u16,
    /// Connect without TLS, as always to registries on this machine.
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
