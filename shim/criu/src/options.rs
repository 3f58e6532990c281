//! Options of CRIU, in CRIU's terms.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use protobuf::EnumOrUnknown;
use rust_criu::rust_criu_protobuf::rpc::{
    Cgroup_root, Criu_cg_mode, Criu_network_lock_method, Criu_opts, Ext_mount_map, Join_namespace,
};

/// `CLONE_NEWNET`: the only namespace that CRIU leaves empty (criu/cr-service.c).
const NEW_NETWORK: u32 = 0x4000_0000;

/// Treatment of cgroups (`--manage-cgroups`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupMode {
    /// Neither dumped nor restored.
    Ignore,
    /// Membership only; the groups must exist.
    None,
    /// Properties of existing groups only.
    Props,
    /// Groups and properties that do not exist yet.
    Soft,
    /// All groups and properties.
    Full,
    /// Like full, and none may exist.
    Strict,
    /// CRIU's default, soft. Also runc's.
    Default,
}

/// Method of blocking the network during a dump (`--network-lock`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkLock {
    /// By iptables-restore, CRIU's default.
    Iptables,
    /// By libnftables, if CRIU was built with libnftables.
    Nftables,
    /// Not at all: right if no TCP connection is to survive.
    Skip,
}

/// Options common to a dump and a restore. A false, `None` or empty option is not sent: CRIU's
/// defaults and the files in /etc/criu decide.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Dump and restore established TCP connections.
    pub tcp_established: bool,
    /// Close established TCP connections: the peers see a reset after the restore.
    pub tcp_close: bool,
    /// Leave out connections that are not accepted yet.
    pub tcp_skip_in_flight: bool,
    /// Allow unix sockets connected to the outside of the tree.
    pub ext_unix_sk: bool,
    /// Allow a session or terminal with a leader outside the tree.
    pub shell_job: bool,
    /// Dump and restore file locks.
    pub file_locks: bool,
    /// Allow open files without a name, by giving each a name.
    pub link_remap: bool,
    /// Largest deleted file stored in the images, in bytes. CRIU's default is 1 MiB.
    pub ghost_limit: Option<u32>,
    /// Treatment of cgroups.
    pub manage_cgroups: Option<CgroupMode>,
    /// Method of blocking the network. A restore takes the method from the images.
    pub network_lock: Option<NetworkLock>,
    /// Give new masters, passed to the caller, to terminals with masters outside the tree.
    pub orphan_pts_master: bool,
    /// Use any path to a device if the original one is missing.
    pub evasive_devices: bool,
    /// Leave out the network namespace's contents, in dump and restore.
    pub empty_network_namespace: bool,
    /// Configuration file of CRIU, with precedence over everything here. A missing file is no
    /// error.
    pub config_file: Option<PathBuf>,
    /// 0 nothing to 4 everything; 4 by default, as in runc, because a failure's cause may be in any
    /// line.
    pub log_level: Option<i32>,
}

/// Default log level.
const LOG_LEVEL: i32 = 4;

/// A mount from outside: CRIU neither dumps nor restores the contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalMount {
    /// For a dump, the place in the tree's root; for a restore, the dump's `value`.
    pub key: String,
    /// For a dump, a name (runc repeats the place); for a restore, the source on the host.
    /// `/dev/null` for a masked file.
    pub value: String,
}

/// Kind of a namespace, by CRIU's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Cgroup.
    Cgroup,
    /// System V IPC.
    Ipc,
    /// Mount.
    Mount,
    /// Network.
    Network,
    /// Process id.
    Pid,
    /// Time.
    Time,
    /// User.
    User,
    /// Host name.
    Uts,
}

impl Namespace {
    /// Returns the name in `/proc/PID/ns/` and in CRIU's options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Ipc => "ipc",
            Self::Mount => "mnt",
            Self::Network => "net",
            Self::Pid => "pid",
            Self::Time => "time",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }

    /// Returns runc's key for an external namespace of this kind, in dumps and restores:
    /// `extRootNetNS`, `extRootPidNS`. Used here too, so that images are the same.
    #[must_use]
    pub fn external_key(self) -> String {
        let name = self.name();
        let (first, rest) = name.split_at(1);
        format!("extRoot{}{rest}NS", first.to_ascii_uppercase())
    }
}

/// Resource of a tree's processes outside the tree (`--external`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum External {
    /// A namespace independent of the tree; a restore inherits one under
    /// [`Namespace::external_key`].
    Namespace {
        /// Kind: network or pid.
        kind: Namespace,
        /// Inode number.
        inode: u64,
    },
    /// An open or mapped file, possibly without a visible name for the processes.
    File {
        /// Number of the file's mount in /proc.
        mount: u64,
        /// Inode number.
        inode: u64,
    },
    /// Anything else, in CRIU's notation: `tty[rdev:dev]`, `unix[inode]`, `veth[in]:out`, ...
    Other(String),
}

impl External {
    /// Returns an open file. The path must be the processes' own: CRIU distinguishes the same file
    /// in two mounts.
    ///
    /// # Errors
    /// Fails if /proc does not name the file's mount, or the inode cannot be read.
    pub fn of_file(file: &File) -> io::Result<Self> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "/proc does not say in which mount the file is");
        Ok(Self::File { mount: mount.ok_or_else(missing)?, inode: file.metadata()?.ino() })
    }

    pub(crate) fn notation(&self) -> String {
        match self {
            Self::Namespace { kind, inode } => format!("{}[{inode}]:{}", kind.name(), kind.external_key()),
            // criu/files-reg.c, `dump_one_reg_file`.
            Self::File { mount, inode } => format!("file[{mount:x}:{inode:x}]"),
            Self::Other(notation) => notation.clone(),
        }
    }
}

/// An existing namespace for a restored tree to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinNamespace {
    /// Kind. CRIU refuses cgroup namespaces.
    pub kind: Namespace,
    /// Path of the namespace, such as `/proc/PID/ns/ipc`.
    pub path: PathBuf,
}

/// A descriptor for a name in the images (`--inherit-fd`).
#[derive(Debug)]
pub struct Inherit {
    /// Name to stand for: `pipe:[INODE]`, `extRootNetNS`, `file[NAME]`, ...
    pub key: String,
    /// The descriptor. criu gets a copy.
    pub fd: OwnedFd,
}

/// Top of a tree in one cgroup hierarchy: the group above all of the tree's processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupRoot {
    /// The controller (`memory`, `name=systemd`); empty for cgroup v2. For a dump all controllers
    /// of the hierarchy, as in `/proc/PID/cgroup`.
    pub controller: String,
    /// Absolute path of the group in the hierarchy.
    pub path: String,
}

/// Places of a restored tree in the cgroup hierarchies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CgroupRoots {
    /// The places at the time of the dump.
    #[default]
    Dumped,
    /// criu's own cgroup at the time of the request, chosen by [`crate::NotifyRestore::started`].
    OfCriu,
}

impl CgroupRoots {
    /// Parses `/proc/PID/cgroup`: `ID:CONTROLLERS:PATH` a line, controllers separated by commas.
    pub(crate) fn parse(text: &str) -> Vec<CgroupRoot> {
        let mut roots = vec![];
        for line in text.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let root = |controller: &str| CgroupRoot { controller: controller.to_owned(), path: path.to_owned() };
            roots.extend(controllers.split(',').map(root));
        }
        roots
    }
}

/// Location of a request's images and messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// A descriptor of this process: CRIU opens `/proc/PID/fd/N` of the peer.
    pub(crate) images_dir_fd: i32,
    pub(crate) work_dir_fd: i32,
    pub(crate) log_file: &'a str,
}

/// Returns the request's options in CRIU's RPC form.
pub(crate) fn to_rpc(options: &Options, place: Place<'_>, root: Option<&Path>, mounts: &[ExternalMount]) -> Criu_opts {
    let mut rpc = Criu_opts::new();
    rpc.set_images_dir_fd(place.images_dir_fd);
    rpc.set_work_dir_fd(place.work_dir_fd);
    rpc.set_log_file(place.log_file.to_owned());
    rpc.set_log_level(options.log_level.unwrap_or(LOG_LEVEL));
    rpc.set_notify_scripts(true);
    let yes = |on: bool| on.then_some(true);
    rpc.tcp_established = yes(options.tcp_established);
    rpc.tcp_close = yes(options.tcp_close);
    rpc.tcp_skip_in_flight = yes(options.tcp_skip_in_flight);
    rpc.ext_unix_sk = yes(options.ext_unix_sk);
    rpc.shell_job = yes(options.shell_job);
    rpc.file_locks = yes(options.file_locks);
    rpc.link_remap = yes(options.link_remap);
    rpc.orphan_pts_master = yes(options.orphan_pts_master);
    rpc.evasive_devices = yes(options.evasive_devices);
    rpc.empty_ns = options.empty_network_namespace.then_some(NEW_NETWORK);
    rpc.ghost_limit = options.ghost_limit;
    rpc.manage_cgroups_mode = options.manage_cgroups.map(|mode| EnumOrUnknown::new(cgroup_mode(mode)));
    rpc.network_lock = options.network_lock.map(|method| EnumOrUnknown::new(network_lock(method)));
    rpc.config_file = options.config_file.as_deref().map(text);
    rpc.root = root.map(text);
    rpc.ext_mnt = mounts.iter().map(external_mount).collect();
    rpc
}

fn external_mount(mount: &ExternalMount) -> Ext_mount_map {
    let mut rpc = Ext_mount_map::new();
    rpc.set_key(mount.key.clone());
    rpc.set_val(mount.value.clone());
    rpc
}

pub(crate) fn cgroup_root(root: &CgroupRoot) -> Cgroup_root {
    let mut rpc = Cgroup_root::new();
    rpc.set_ctrl(root.controller.clone());
    rpc.set_path(root.path.clone());
    rpc
}

pub(crate) fn join_namespace(join: &JoinNamespace) -> Join_namespace {
    let mut rpc = Join_namespace::new();
    rpc.set_ns(join.kind.name().to_owned());
    rpc.set_ns_file(text(&join.path));
    rpc
}

fn cgroup_mode(mode: CgroupMode) -> Criu_cg_mode {
    match mode {
        CgroupMode::Ignore => Criu_cg_mode::IGNORE,
        CgroupMode::None => Criu_cg_mode::CG_NONE,
        CgroupMode::Props => Criu_cg_mode::PROPS,
        CgroupMode::Soft => Criu_cg_mode::SOFT,
        CgroupMode::Full => Criu_cg_mode::FULL,
        CgroupMode::Strict => Criu_cg_mode::STRICT,
        CgroupMode::Default => Criu_cg_mode::DEFAULT,
    }
}

fn network_lock(method: NetworkLock) -> Criu_network_lock_method {
    match method {
        NetworkLock::Iptables => Criu_network_lock_method::IPTABLES,
        NetworkLock::Nftables => Criu_network_lock_method::NFTABLES,
        NetworkLock::Skip => Criu_network_lock_method::SKIP,
    }
}

/// Converts a path for Protobuf, which has only UTF-8 strings. Any other path is sent changed, and
/// reported missing by CRIU.
pub(crate) fn text(path: &Path) -> String {
    String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned()
}
