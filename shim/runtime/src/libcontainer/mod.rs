//! x
use std::path::PathBuf;

use async_trait::async_trait;
use oci_spec::runtime::{Features, LinuxResources};
use reaper::{Child, Reaper};

use crate::{CreateRequest, ExecRequest, OciRuntime, RuntimeError};

/// x
#[derive(Debug)]
pub struct Libcontainer {}

impl Libcontainer {
    /// x
    #[must_use]
    pub fn new(_reaper: Reaper, _root: PathBuf, _systemd_cgroup: bool) -> Self {
        Self {}
    }
}

#[async_trait]
impl OciRuntime for Libcontainer {
    async fn create(&self, _request: CreateRequest) -> Result<Child, RuntimeError> {
        unimplemented!()
    }
    async fn start(&self, _id: &str) -> Result<(), RuntimeError> {
        unimplemented!()
    }
    async fn exec(&self, _request: ExecRequest) -> Result<Child, RuntimeError> {
        unimplemented!()
    }
    async fn pause(&self, _id: &str) -> Result<(), RuntimeError> {
        unimplemented!()
    }
    async fn resume(&self, _id: &str) -> Result<(), RuntimeError> {
        unimplemented!()
    }
    async fn update(&self, _id: &str, _resources: &LinuxResources) -> Result<(), RuntimeError> {
        unimplemented!()
    }
    async fn delete(&self, _id: &str) -> Result<(), RuntimeError> {
        unimplemented!()
    }
    async fn features(&self) -> Result<Features, RuntimeError> {
        unimplemented!()
    }
}

/// First argument by which this binary knows that it is to be the helper.
pub const HELPER: &str = "libcontainer-helper";

/// x
pub fn helper_main() -> std::process::ExitCode {
    unimplemented!()
}
