//! Runtime options, in the three forms of containerd's clients.
//!
//! `ctr`, nerdctl and the CRI send `containerd.runc.v1.Options` to runtimes named like runc's.
//! Other runtimes get `runtimeoptions.v1.Options` with TOML inside, or nothing from nerdctl. `ctr c
//! restore` sends an empty `Any`.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message};
use containerd_shim_protos::shim::oci::Options;
use runtime::{Choice, Kind, Prepare};
use serde::Deserialize;

const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";
/// containerd's own limit on a shim's configuration at the start.
const CONFIG_SIZE_LIMIT: u64 = 10 << 20;

/// State of runc, in the folder of containerd's own shim, for `runc --root` to find the containers.
const RUNC_ROOT: &str = "/run/containerd/runc";
/// State of the embedded runtime.
const LIBCONTAINER_ROOT: &str = "/run/containerd/gpusnap";

/// Failure to read options.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    /// A type outside the protocol of this shim's clients.
    #[error("runtime options of type {type_url} are not known: send {RUNC_OPTIONS} or {RUNTIME_OPTIONS}")]
    Type { type_url: String },
    /// Bytes other than the claimed message.
    #[error("malformed runtime options of type {type_url}")]
    Message {
        type_url: String,
        #[source]
        source: containerd_shim_protos::protobuf::Error,
    },
    /// The file named by `config_path` cannot be used.
    #[error("cannot read runtime options from {path}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A preparation that does not exist.
    #[error("runtime option Prepare is {name:?}, neither \"none\" nor \"seccomp\"")]
    Prepare { name: String },
    /// Malformed TOML, or keys of no runtime option.
    #[error("malformed runtime options in TOML")]
    Toml(#[source] toml::de::Error),
}

/// The TOML form, with runc's keys as in containerd's own configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct TomlOptions {
    no_pivot_root: bool,
    no_new_keyring: bool,
    shim_cgroup: String,
    io_uid: u32,
    io_gid: u32,
    binary_name: String,
    root: String,
    systemd_cgroup: bool,
    criu_image_path: String,
    criu_work_path: String,
    /// gpusnap's own: preparation of containers, `none` or `seccomp`.
    prepare: Option<String>,
    #[serde(flatten)]
    unknown: toml::Table,
}

/// Decodes options of every form; none at all, and an empty `Any`, are the defaults.
pub(crate) fn decode(any: Option<&Any>) -> Result<Options, OptionsError> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else { return Ok(Options::default()) };
    let malformed = |source| OptionsError::Message { type_url: any.type_url.clone(), source };
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        RUNC_OPTIONS => Options::parse_from_bytes(&any.value).map_err(malformed),
        RUNTIME_OPTIONS => {
            let runtime_options = RuntimeOptions::parse(&any.value).map_err(malformed)?;
            runtime_options.into_options()
        }
        _ => Err(OptionsError::Type { type_url: any.type_url.clone() }),
    }
}

/// Returns the preparation that runtime options name, in TOML only.
pub(crate) fn preparation(any: Option<&Any>) -> Result<Option<Prepare>, OptionsError> {
    let is_ours = |any: &&Any| any.type_url.rsplit('/').next() == Some(RUNTIME_OPTIONS);
    let Some(any) = any.filter(is_ours) else { return Ok(None) };
    let malformed = |source| OptionsError::Message { type_url: any.type_url.clone(), source };
    let Some(name) = RuntimeOptions::parse(&any.value).map_err(malformed)?.toml()?.prepare else { return Ok(None) };
    Prepare::parse(&name).map(Some).ok_or(OptionsError::Prepare { name })
}

/// `runtimeoptions.v1.Options`, a message missing from containerd-shim-protos.
#[derive(Default)]
struct RuntimeOptions {
    config_path: String,
    config_body: Vec<u8>,
}

impl RuntimeOptions {
    /// Parses the fields of containerd's api/types/runtimeoptions/v1: type_url = 1, config_path =
    /// 2, config_body = 3.
    fn parse(bytes: &[u8]) -> containerd_shim_protos::protobuf::Result<Self> {
        const TYPE_URL: u32 = 10;
        const CONFIG_PATH: u32 = 18;
        const CONFIG_BODY: u32 = 26;
        let mut options = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                TYPE_URL => drop(input.read_string()?),
                CONFIG_PATH => options.config_path = input.read_string()?,
                CONFIG_BODY => options.config_body = input.read_bytes()?,
                tag => containerd_shim_protos::protobuf::rt::skip_field_for_tag(tag, &mut input)?,
            }
        }
        Ok(options)
    }

    /// Reads the TOML. The body wins over the file, as with containerd's other shims.
    fn toml(self) -> Result<TomlOptions, OptionsError> {
        let text = if !self.config_body.is_empty() {
            String::from_utf8_lossy(&self.config_body).into_owned()
        } else if !self.config_path.is_empty() {
            read_limited(Path::new(&self.config_path))?
        } else {
            return Ok(TomlOptions::default());
        };
        toml::from_str(&text).map_err(OptionsError::Toml)
    }

    fn into_options(self) -> Result<Options, OptionsError> {
        let toml = self.toml()?;
        for key in toml.unknown.keys() {
            tracing::warn!("runtime option {key} is not known and has no effect");
        }
        Ok(Options {
            no_pivot_root: toml.no_pivot_root,
            no_new_keyring: toml.no_new_keyring,
            shim_cgroup: toml.shim_cgroup,
            io_uid: toml.io_uid,
            io_gid: toml.io_gid,
            binary_name: toml.binary_name,
            root: toml.root,
            systemd_cgroup: toml.systemd_cgroup,
            criu_image_path: toml.criu_image_path,
            criu_work_path: toml.criu_work_path,
            ..Options::default()
        })
    }
}

fn read_limited(path: &Path) -> Result<String, OptionsError> {
    let failed = |source| OptionsError::File { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > CONFIG_SIZE_LIMIT {
        return Err(failed(std::io::Error::other("larger than 10 MiB")));
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// Returns the runtime for a new container. A `cgroups_path` of the form `slice:prefix:name` goes
/// through systemd, even if the client dropped the option (nerdctl does for names other than
/// runc's).
pub(crate) fn choose_runtime(options: &Options, namespace: &str, cgroups_path: Option<&Path>) -> Choice {
    let (kind, default_root) = if options.binary_name.is_empty() {
        (Kind::Libcontainer, LIBCONTAINER_ROOT)
    } else {
        (Kind::Command(PathBuf::from(&options.binary_name)), RUNC_ROOT)
    };
    let root = if options.root.is_empty() { default_root } else { &options.root };
    let systemd = options.systemd_cgroup || cgroups_path.and_then(Path::to_str).is_some_and(is_systemd_path);
    Choice::new(kind, Path::new(root).join(namespace), systemd)
}

fn is_systemd_path(path: &str) -> bool {
    !path.starts_with('/') && path.split(':').count() == 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any { type_url: type_url.into(), value, ..Any::default() }
    }

    fn toml_any(config_path: &str, body: &str) -> Any {
        let mut value = vec![];
        for (tag, bytes) in [(10, "io.containerd.gpusnap.v2.Options"), (18, config_path), (26, body)] {
            if !bytes.is_empty() {
                value.push(tag);
                value.push(u8::try_from(bytes.len()).unwrap());
                value.extend(bytes.as_bytes());
            }
        }
        any(RUNTIME_OPTIONS, value)
    }

    #[test]
    fn a_preparation_is_named_in_toml_only() {
        let named = |text: &str| preparation(Some(&toml_any("", text)));
        assert_eq!(named("Prepare = \"none\"").unwrap(), Some(Prepare::Nothing));
        assert_eq!(named("Prepare = \"seccomp\"").unwrap(), Some(Prepare::Seccomp));
        assert_eq!(named("BinaryName = \"runc\"").unwrap(), None);
        assert_eq!(preparation(None).unwrap(), None);
        assert!(named("Prepare = \"all\"").unwrap_err().to_string().contains("\"all\""));
    }

    #[test]
    fn no_options_and_an_empty_any_are_the_defaults() {
        assert_eq!(decode(None).unwrap(), Options::default());
        assert_eq!(decode(Some(&Any::default())).unwrap(), Options::default());
    }

    #[test]
    fn runc_options_are_taken_as_they_are() {
        let options = Options { binary_name: "crun".into(), systemd_cgroup: true, ..Options::default() };
        let any = any("containerd.runc.v1.Options", options.write_to_bytes().unwrap());
        assert_eq!(decode(Some(&any)).unwrap(), options);
    }

    #[test]
    fn toml_in_the_body_is_what_the_cri_sends() {
        let options = decode(Some(&toml_any("", "BinaryName = \"runc\"\nSystemdCgroup = true\n"))).unwrap();
        assert_eq!(options.binary_name, "runc");
        assert!(options.systemd_cgroup);
    }

    #[test]
    fn toml_in_a_file_is_what_ctr_sends() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "BinaryName = \"crun\"\nNoPivotRoot = true").unwrap();
        let options = decode(Some(&toml_any(file.path().to_str().unwrap(), ""))).unwrap();
        assert_eq!(options.binary_name, "crun");
        assert!(options.no_pivot_root);
    }

    #[test]
    fn unknown_keys_are_passed_over() {
        assert_eq!(decode(Some(&toml_any("", "CriuPath = \"/x\""))).unwrap(), Options::default());
    }

    #[test]
    fn errors_name_what_was_wrong() {
        let text = |any| decode(Some(&any)).unwrap_err().to_string();
        assert!(text(any("example.Options", vec![])).contains("example.Options"));
        assert!(text(any(RUNC_OPTIONS, vec![0xff, 0xff])).contains("malformed"));
        assert!(text(toml_any("/nonexistent/options.toml", "")).contains("/nonexistent/options.toml"));
        assert!(text(toml_any("", "BinaryName = 3")).contains("TOML"));
    }

    #[test]
    fn the_systemd_driver_is_inferred_from_the_cgroup_path() {
        let systemd = |path: &str| choose_runtime(&Options::default(), "ns", Some(Path::new(path))).systemd_cgroup;
        assert!(systemd("system.slice:nerdctl:abc"));
        assert!(systemd("kubepods-burstable-podx.slice:cri-containerd:abc"));
        assert!(!systemd("/default/abc"));
        assert!(!systemd("/k8s.io/a:b:c"));
    }

    #[test]
    fn a_binary_name_chooses_the_command_line_and_its_root() {
        let options = Options { binary_name: "runc".into(), ..Options::default() };
        let choice = choose_runtime(&options, "default", None);
        assert_eq!(choice.kind, Kind::Command("runc".into()));
        assert_eq!(choice.root, Path::new("/run/containerd/runc/default"));
        assert_eq!(choose_runtime(&Options::default(), "default", None).kind, Kind::Libcontainer);
    }
}
