//! Errors with their causes, on one line.

use std::error::Error;

/// Returns an error with all causes, `cannot read the file: no such file`. A message never repeats
/// its cause.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Wrapped(Option<std::io::Error>);

    impl fmt::Display for Wrapped {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("cannot read the file")
        }
    }

    impl Error for Wrapped {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.0.as_ref().map(|cause| cause as _)
        }
    }

    #[test]
    fn each_cause_is_told_once_in_order() {
        assert_eq!(chain(&Wrapped(None)), "cannot read the file");
        assert_eq!(
            chain(&Wrapped(Some(std::io::Error::other("the disk is gone")))),
            "cannot read the file: the disk is gone"
        );
    }
}
