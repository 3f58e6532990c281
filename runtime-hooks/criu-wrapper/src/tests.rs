use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn the_real_criu_is_the_first_in_the_path_of_the_runtime() {
    let [empty, first, second] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    for folder in [&first, &second] {
        let file = folder.path().join(CRIU);
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let path = std::env::join_paths([&empty, &first, &second].map(tempfile::TempDir::path)).unwrap();
    assert_eq!(real_criu(&path).unwrap(), first.path().join(CRIU));
    let missing = real_criu(empty.path().as_os_str()).unwrap_err();
    assert_eq!(missing.to_string(), "there is no criu in the PATH");
}

#[test]
fn a_runtime_finds_this_binary_under_the_name_of_criu() {
    let [folder, work] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let mut command = Command::new("runc");
    insert(&mut command, folder.path(), work.path()).unwrap();
    let value = |name: &str| command.get_envs().find(|(key, _)| *key == name).unwrap().1.unwrap().to_owned();
    let link = std::env::split_paths(&value("PATH")).next().unwrap().join(CRIU);
    assert_eq!(std::fs::canonicalize(link).unwrap(), std::env::current_exe().unwrap().canonicalize().unwrap());
    assert_eq!(value(PATH), std::env::var_os("PATH").unwrap_or_default());
    assert_eq!(value(WORK), work.path());
}

#[test]
fn only_a_program_that_a_runtime_found_for_criu_is_the_wrapper() {
    // Nothing has set the variable in this process.
    assert!(!is_wrapper(OsStr::new("/usr/sbin/criu")));
    assert!(!is_wrapper(OsStr::new("containerd-shim-gpusnap-v2")));
}

#[test]
fn the_socket_of_swrk_is_its_last_argument() {
    let arguments = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    assert_eq!(socket_number(&arguments(&["swrk", "3"])), Some(3));
    assert_eq!(socket_number(&arguments(&["--config", "/x", "swrk", "7"])), Some(7));
    for words in [&["--version"][..], &["swrk"], &["swrk", "x"], &["check", "3"]] {
        assert_eq!(socket_number(&arguments(words)), None, "{words:?}");
    }
}

#[test]
fn an_end_by_a_signal_is_told_as_shells_tell_it() {
    assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
    assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
}
