//! Reading the kernel's files.
//!
//! A file that is not there is no error here: controllers can be off, kernels differ, and a cgroup can go at any
//! moment.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::CgroupError;

/// Whether an error means that the cgroup, or the file in it, is gone: ENOENT when it is opened, ENODEV when it was
/// open already.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

/// The file's text; `None` when it is not there.
pub(crate) fn text(path: &Path) -> Result<Option<String>, CgroupError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        // What a controller does not do in this place: pressure files where PSI is off, cgroup.procs of a thread group.
        Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => Ok(None),
        Err(source) => Err(CgroupError::File { action: "read", path: path.to_owned(), source }),
    }
}

/// Writes the file in one go.
pub(crate) fn write(path: &Path, content: &str) -> Result<(), CgroupError> {
    // Not fs::write: it would create the file, in a directory that is not a cgroup.
    let file = std::fs::OpenOptions::new().write(true).open(path);
    file.and_then(|mut file| io::Write::write_all(&mut file, content.as_bytes())).map_err(|source| CgroupError::File {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

/// Takes it for done when the cgroup is gone.
pub(crate) fn unless_gone(result: Result<(), CgroupError>) -> Result<(), CgroupError> {
    match result {
        Err(CgroupError::File { source, .. }) if is_gone(&source) => Ok(()),
        other => other,
    }
}

/// A number. Negative ones, which the kernel writes in a few places for "nothing", count as 0, and `max` as `unlimited`.
pub(crate) fn number(path: &Path, unlimited: u64) -> Result<u64, CgroupError> {
    Ok(text(path)?.map_or(0, |text| parse(text.trim(), unlimited)))
}

pub(crate) fn parse(value: &str, unlimited: u64) -> u64 {
    if value == "max" { unlimited } else { value.parse().unwrap_or(0) }
}

/// `key value` lines; empty when the file is not there.
pub(crate) fn pairs(path: &Path) -> Result<Pairs, CgroupError> {
    Ok(Pairs(text(path)?.map(|text| {
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(key, value)| (key.to_owned(), parse(value.trim(), u64::MAX)))
            .collect()
    })))
}

/// What a file of `key value` lines said.
#[derive(Debug)]
pub(crate) struct Pairs(Option<HashMap<String, u64>>);

impl Pairs {
    /// The file was there.
    pub(crate) fn is_present(&self) -> bool {
        self.0.is_some()
    }

    /// The value of `key`, 0 when it is not there: kernels differ in what they count.
    pub(crate) fn get(&self, key: &str) -> u64 {
        self.0.as_ref().and_then(|pairs| pairs.get(key)).copied().unwrap_or(0)
    }
}

/// `device hca_handle=N hca_object=N` lines of the rdma controller, of either version.
pub(crate) fn rdma(text: &str) -> impl Iterator<Item = (String, u32, u32)> {
    text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [device, first, second] = fields.as_slice() else { return None };
        let (mut handles, mut objects) = (0, 0);
        for (key, value) in [first, second].into_iter().filter_map(|pair| pair.split_once('=')) {
            let value = if value == "max" { u32::MAX } else { value.parse().unwrap_or(0) };
            match key {
                "hca_handle" => handles = value,
                "hca_object" => objects = value,
                _ => {}
            }
        }
        Some(((*device).to_owned(), handles, objects))
    })
}

/// Huge page sizes, as the kernel names them in `hugetlb.SIZE.FILE`.
pub(crate) fn huge_page_sizes(directory: &Path, file: &str) -> Result<Vec<String>, CgroupError> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(vec![]),
        Err(source) => return Err(CgroupError::File { action: "read", path: directory.to_owned(), source }),
    };
    let mut sizes: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(file)?.strip_suffix('.')?;
            // With a dot it is another file: hugetlb.2MB.rsvd.usage_in_bytes.
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort_unstable();
    Ok(sizes)
}
