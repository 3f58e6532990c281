//! Destinations of output, in containerd's notation.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::StdioError;

/// A parsed destination of standard output or standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nowhere.
    Null,
    /// A fifo that containerd made.
    Fifo(String),
    /// A file to append to.
    File(PathBuf),
    /// A logger to run.
    Binary(LoggerUri),
}

/// `binary:///path/to/logger?key=value&key=value`: the keys and values are the logger's arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoggerUri {
    pub(crate) path: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// `binary-v2://`: the logger reports ready by writing a byte, not just by closing the
    /// descriptor.
    pub(crate) writes_when_ready: bool,
}

impl fmt::Display for LoggerUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "binary://{}", self.path.display())
    }
}

impl Target {
    pub(crate) fn parse(uri: &str) -> Result<Self, StdioError> {
        if uri.is_empty() {
            return Ok(Self::Null);
        }
        let Some((scheme, rest)) = uri.split_once("://") else { return Ok(Self::Fifo(uri.to_owned())) };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = percent_decode_str(path).decode_utf8_lossy().into_owned();
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path.into())),
            "binary" | "binary-v2" => Ok(Self::Binary(LoggerUri {
                path: path.into(),
                // A key without a value is one argument, as with Go's url.Values.
                arguments: form_urlencoded::parse(query.as_bytes())
                    .flat_map(|(key, value)| [key.into_owned(), value.into_owned()])
                    .filter(|argument| !argument.is_empty())
                    .collect(),
                writes_when_ready: scheme == "binary-v2",
            })),
            _ => Err(StdioError::Uri { uri: uri.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_path_is_a_fifo() {
        assert_eq!(Target::parse("").unwrap(), Target::Null);
        assert_eq!(Target::parse("/run/f/out").unwrap(), Target::Fifo("/run/f/out".into()));
        assert_eq!(Target::parse("fifo:///run/f/out").unwrap(), Target::Fifo("/run/f/out".into()));
    }

    #[test]
    fn a_logger_gets_keys_and_values_as_arguments() {
        let target =
            Target::parse("binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fn&flag").unwrap();
        let expected = LoggerUri {
            path: "/usr/bin/nerdctl".into(),
            arguments: vec!["_NERDCTL_INTERNAL_LOGGING".into(), "/var/lib/n".into(), "flag".into()],
            writes_when_ready: false,
        };
        assert_eq!(target, Target::Binary(expected));
    }

    #[test]
    fn a_file_uri_may_hold_escaped_spaces() {
        assert_eq!(Target::parse("file:///var/log/a%20b.log").unwrap(), Target::File("/var/log/a b.log".into()));
    }

    #[test]
    fn other_schemes_are_refused_by_name() {
        assert!(Target::parse("syslog://x").unwrap_err().to_string().contains("syslog://x"));
    }
}
