//! x
use std::path::PathBuf;

use async_trait::async_trait;
use oci_spec::runtime::{Features, LinuxResources};
use reaper::{Child, Reaper};

use crate::{CreateRequest, ExecRequest, OciRuntime, RuntimeError};

/// x
#[derive(Debug)]
pub struct Command {}

impl Command {
    /// x
    #[must_use]
    pub fn new(_reaper: Reaper, _binary: PathBuf, _root: PathBuf, _systemd_cgroup: bool) -> Self {
        Self {}
    }
}

#[async_trait]
impl OciRuntime for Command {
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
