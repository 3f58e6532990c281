//! Skips that tests decide on at run time. Each has to be on a list.

/// Lines `SUITE TEST: BEGINNING OF THE REASON`.
const LIST: &str = include_str!("../../skips.txt");

/// Returns whether a test of a suite may be skipped for this reason.
#[must_use]
pub fn is_listed(suite: &str, test: &str, reason: &str) -> bool {
    LIST.lines()
        .filter_map(parse)
        .any(|(of, name, begin)| of == suite && (name == "*" || name == test) && reason.starts_with(begin))
}

/// Returns suite, test and beginning of the reason.
fn parse(line: &str) -> Option<(&str, &str, &str)> {
    let (test, reason) = line.split_once(": ")?;
    let (suite, test) = test.split_once(' ')?;
    (!line.starts_with('#')).then_some((suite, test, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_list_is_a_comment_or_an_entry() {
        let odd: Vec<&str> = LIST.lines().filter(|line| !line.starts_with('#') && parse(line).is_none()).collect();
        assert!(odd.is_empty(), "{odd:?}");
    }

    #[test]
    fn a_skip_is_listed_for_its_test_and_its_reason_only() {
        assert!(is_listed("e2e", "crun_can_be_chosen", "the test bed has no crun"));
        assert!(!is_listed("e2e", "crun_can_be_chosen", "nobody felt like it"));
        assert!(!is_listed("e2e", "another_test", "the test bed has no crun"));
        assert!(!is_listed("contract", "crun_can_be_chosen", "the test bed has no crun"));
    }
}
