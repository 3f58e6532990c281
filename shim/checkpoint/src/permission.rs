//! Permissions of a restore, independent of the checkpoint's claims.
//!
//! A checkpoint may come from anywhere, so its claims are no permission. CRIU is root, and connects
//! sockets and rebuilds TCP connections on behalf of the images. In a network namespace of the
//! container or the pod that reaches no more than the container itself. In the host's network
//! namespace CRIU would reach the host's abstract sockets as root, and other programs' connections:
//! the container's annotations have to allow that.

use std::path::{Path, PathBuf};

use images::Image;
use runtime::{Allow, Privileges, Tcp};

use crate::annotations::{AnnotationError, Annotations};
use crate::manifest::Manifest;

/// The network namespace of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A namespace of the container, made with it.
    New {
        /// Hooks may put interfaces into it.
        has_hooks: bool,
    },
    /// A namespace made before, such as the pod's.
    Joined(PathBuf),
    /// The host's namespace, or an unknown one.
    Hosts,
}

impl Network {
    /// Reads the configuration in a bundle. A namespace by path counts as the container's own
    /// unless it is this process's.
    #[must_use]
    pub fn of_bundle(bundle: &Path) -> Self {
        let Ok(spec) = oci_spec::runtime::Spec::load(bundle.join("config.json")) else { return Self::Hosts };
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
        let network = namespaces.iter().find(|of| of.typ() == oci_spec::runtime::LinuxNamespaceType::Network);
        match network.map(|of| of.path().as_deref()) {
            None => Self::Hosts,
            Some(None) => Self::New { has_hooks: spec.hooks().is_some() },
            Some(Some(path)) if is_mine(path) => Self::Hosts,
            Some(Some(path)) => Self::Joined(path.to_owned()),
        }
    }
}

fn is_mine(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    id(path) == id(Path::new("/proc/self/ns/net"))
}

/// Returns the permissions of a restore. A checkpoint without a manifest was made by another shim,
/// and all its contents were allowed then.
///
/// # Errors
/// An annotation that is not valid.
pub fn allow(
    image: &Image,
    manifest: Option<&Manifest>,
    annotations: &Annotations,
    network: &Network,
) -> Result<Allow, AnnotationError> {
    let tcp = if image.tcp_close { Tcp::Close } else { Tcp::Keep };
    let other = Allow { tcp, external_unix_sockets: true, shell_job: false };
    let mut allow = manifest.map_or(other, Manifest::allow);
    if *network == Network::Hosts && annotations.privileges()? == Privileges::Container {
        allow.external_unix_sockets = false;
        // By [`Tcp::Auto`] the restore closes all that leads outside.
        if allow.tcp == Tcp::Keep {
            allow.tcp = Tcp::Refuse;
        }
    }
    match annotations.tcp()? {
        // CRIU has closed all in the images, and wants to be told again.
        Some(Tcp::Auto) if allow.tcp == Tcp::Close => {}
        None => {}
        Some(tcp) => allow.tcp = tcp,
    }
    Ok(allow)
}

/// Returns the repository from which a snapshot may be pulled: the container's annotation, or else
/// the node's. The checkpoint's own entry counts only within the node's repository.
#[must_use]
pub fn registry(annotations: &Annotations, of_node: Option<&str>, said: Option<&str>) -> Option<String> {
    let within = |said: &&str| of_node.is_some_and(|node| is_within(said, node.trim_end_matches('/')));
    annotations.registry().or_else(|| said.filter(within).or(of_node).map(str::to_owned))
}

/// Returns whether a repository is the other, or below the other. A tag or a digest may follow.
fn is_within(repository: &str, other: &str) -> bool {
    let rest = repository.strip_prefix(other);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '@']) || is_tag(rest))
        && !repository.split('/').any(|part| part == "..")
}

/// Returns whether the text is a tag, and not the port of another host.
fn is_tag(rest: &str) -> bool {
    rest.starts_with(':') && !rest.contains('/')
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use runtime::{Phase, Timeline};

    use super::*;

    fn annotations(all: &[(&str, &str)]) -> Annotations {
        let all: HashMap<_, _> = all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Annotations::parse(&all).unwrap()
    }

    const OWN: Network = Network::New { has_hooks: false };

    fn allowed(saved: Option<Allow>, network: &Network, all: &[(&str, &str)]) -> Allow {
        let timeline = Timeline::start(Phase::Freeze);
        let manifest = saved.map(|allow| Manifest::new("c", "runc".into(), allow, None, None, None, &timeline));
        allow(&Image::default(), manifest.as_ref(), &annotations(all), network).unwrap()
    }

    #[test]
    fn what_a_checkpoint_says_is_allowed_where_it_reaches_no_further_than_the_container() {
        let saved = Allow { tcp: Tcp::Keep, external_unix_sockets: true, shell_job: true };
        assert_eq!(allowed(Some(saved), &OWN, &[]), saved);
        let hosts = Allow { tcp: Tcp::Refuse, external_unix_sockets: false, shell_job: true };
        assert_eq!(allowed(Some(saved), &Network::Hosts, &[]), hosts);
        let closes = Allow { tcp: Tcp::Close, ..saved };
        assert_eq!(allowed(Some(closes), &Network::Hosts, &[]).tcp, Tcp::Close);
        let auto = Allow { tcp: Tcp::Auto, ..saved };
        assert_eq!(allowed(Some(auto), &Network::Hosts, &[]).tcp, Tcp::Auto);
        let foreign = Allow { tcp: Tcp::Refuse, external_unix_sockets: false, shell_job: false };
        assert_eq!(allowed(None, &Network::Hosts, &[]), foreign);
    }

    #[test]
    fn the_container_has_the_last_word() {
        let saved = Allow { tcp: Tcp::Keep, external_unix_sockets: true, shell_job: false };
        let tcp = |network, value| allowed(Some(saved), network, &[("gpusnap.dev/tcp", value)]).tcp;
        assert_eq!(tcp(&Network::Hosts, "keep"), Tcp::Keep);
        assert_eq!(tcp(&OWN, "auto"), Tcp::Auto);
        let closed = Allow { tcp: Tcp::Close, ..saved };
        assert_eq!(allowed(Some(closed), &OWN, &[("gpusnap.dev/tcp", "auto")]).tcp, Tcp::Close);
        assert_eq!(tcp(&OWN, "close"), Tcp::Close);
        assert_eq!(tcp(&OWN, "refuse"), Tcp::Refuse);
        let snapshot = [("gpusnap.dev/restore-privileges", "snapshot")];
        assert_eq!(allowed(Some(saved), &Network::Hosts, &snapshot), saved);
    }

    #[test]
    fn a_container_without_a_network_namespace_is_in_the_hosts() {
        let bundle = tempfile::tempdir().unwrap();
        let network = |namespaces: &str| {
            let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}}}}"#);
            std::fs::write(bundle.path().join("config.json"), spec).unwrap();
            Network::of_bundle(bundle.path())
        };
        assert_eq!(network(r#"{"type":"pid"}"#), Network::Hosts);
        assert_eq!(network(r#"{"type":"pid"},{"type":"network"}"#), OWN);
        assert_eq!(network(r#"{"type":"network","path":"/proc/self/ns/net"}"#), Network::Hosts);
        assert_eq!(
            network(r#"{"type":"network","path":"/proc/self/ns/mnt"}"#),
            Network::Joined("/proc/self/ns/mnt".into())
        );
        assert_eq!(Network::of_bundle(&bundle.path().join("none")), Network::Hosts);
    }

    #[test]
    fn only_the_node_and_the_container_say_where_snapshots_are_pulled_from() {
        let none = annotations(&[]);
        let asked = annotations(&[("gpusnap.dev/registry", "asked.example/x")]);
        assert_eq!(registry(&none, None, Some("evil.example/x")), None);
        assert_eq!(registry(&none, Some("node.example/team"), Some("evil.example/x")).unwrap(), "node.example/team");
        assert_eq!(registry(&asked, Some("node.example"), Some("node.example/x")).unwrap(), "asked.example/x");
        for within in
            ["node.example/team/vit", "node.example/team", "node.example/team:warm", "node.example/team/vit:warm"]
        {
            assert_eq!(registry(&none, Some("node.example/team"), Some(within)).unwrap(), within);
        }
        for out in ["node.example/teams", "node.example/team/../x", "node.example/team:80/x", "node.example"] {
            assert_eq!(registry(&none, Some("node.example/team"), Some(out)).unwrap(), "node.example/team", "{out}");
        }
    }
}
