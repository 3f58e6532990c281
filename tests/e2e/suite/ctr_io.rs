//! Standard streams to the last byte, terminals, log URIs.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::pty::Pty;
use e2e::{Case, Test, case, ensure_eq, ensure_has, eventually, sha256};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(stdout_of_50_megabytes_arrives_to_the_last_byte),
        case!(stdout_of_an_exec_of_50_megabytes_arrives_to_the_last_byte),
        case!(the_last_words_before_exit_arrive),
        case!(stderr_and_stdout_stay_apart),
        case!(stdin_of_10_megabytes_arrives_and_ends),
        case!(stdin_of_an_exec_arrives_and_ends),
        case!(stdin_of_an_exec_that_ends_at_once_arrives_and_ends),
        case!(stdin_is_answered_line_by_line),
        case!(a_slow_reader_loses_nothing),
        case!(a_terminal_has_the_clients_size_and_follows_it),
        case!(an_exec_has_a_terminal_of_its_own),
        case!(ctrl_c_on_the_terminal_interrupts_the_container),
        case!(a_client_that_vanishes_leaves_the_container_running),
        case!(a_file_log_has_everything),
        case!(a_binary_logger_gets_everything_and_knows_the_container),
        case!(a_binary_logger_that_does_not_start_is_an_error),
        case!(output_that_nobody_reads_does_not_block_deletion),
        case!(a_second_client_can_attach),
    ]
}

/// Bytes that are the same each time, and fit no pattern of chunk sizes.
fn stream(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(bytes);
    data
}

/// Puts the bytes into a container's reach; returns the mount option.
fn shared_file(t: &Test, bytes: &[u8]) -> Result<String> {
    t.file("data", bytes)?;
    Ok(format!("type=bind,src={},dst=/shared,options=rbind:rw", t.folder()?.display()))
}

fn same_bytes(saw: &[u8], expected: &[u8]) -> Result<()> {
    ensure_eq!((saw.len(), sha256(saw)), (expected.len(), sha256(expected)), "bytes and checksum");
    Ok(())
}

fn stdout_of_50_megabytes_arrives_to_the_last_byte(t: &Test) -> Result<()> {
    let data = stream(50 << 20);
    let mount = shared_file(t, &data)?;
    let out = t.ctr().run(&t.id("c"), &["--rm", "--mount", &mount], &["cat", "/shared/data"]).ok()?;
    same_bytes(&out.stdout, &data)
}

fn stdout_of_an_exec_of_50_megabytes_arrives_to_the_last_byte(t: &Test) -> Result<()> {
    let data = stream(50 << 20);
    let (id, mount) = (t.id("c"), shared_file(t, &data)?);
    t.ctr().start(&id, &["--mount", &mount], &["sh", "-c", IDLE])?;
    same_bytes(&t.ctr().exec(&id, &["cat", "/shared/data"]).ok()?.stdout, &data)
}

fn the_last_words_before_exit_arrive(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    for round in 0..20 {
        let out =
            t.ctr().exec(&id, &["sh", "-c", &format!("echo -n last words {round}; exit 1")]).run()?.expect_code(1)?;
        ensure_eq!(out.text(), format!("last words {round}"));
    }
    let out = t.ctr().run(&t.id("c"), &["--rm"], &["echo", "-n", "last words"]).ok()?;
    ensure_eq!(out.text(), "last words");
    Ok(())
}

fn stderr_and_stdout_stay_apart(t: &Test) -> Result<()> {
    // The container lives until both streams have been seen: on a loaded machine ctr may come too
    // late for the stderr of an ended container, also with runc's shim.
    let script = "echo to stdout; echo to stderr >&2; read line";
    let (once, id) = (t.id("c"), t.id("c"));
    t.ctr().start_sh(&id, IDLE)?;
    for cmd in [t.ctr().run(&once, &["--rm"], &["sh", "-c", script]), t.ctr().exec(&id, &["sh", "-c", script])] {
        let mut client = cmd.spawn()?;
        client.sees("to stdout\n")?;
        client.sees_error("to stderr\n")?;
        client.write(b"\n")?;
        let out = client.wait()?.expect_code(0)?;
        ensure_eq!(out.text(), "to stdout\n");
    }
    Ok(())
}

fn stdin_of_10_megabytes_arrives_and_ends(t: &Test) -> Result<()> {
    let data = stream(10 << 20);
    let cmd = t.ctr().run(&t.id("c"), &["--rm"], &["sh", "-c", "cat | sha256sum"]);
    let out = cmd.stdin_bytes(data.clone()).ok()?;
    ensure_eq!(out.trimmed(), format!("{}  -", sha256(&data)));
    Ok(())
}

fn stdin_of_an_exec_arrives_and_ends(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let data = stream(10 << 20);
    let out = t.ctr().exec(&id, &["sh", "-c", "cat | sha256sum"]).stdin_bytes(data.clone()).ok()?;
    ensure_eq!(out.trimmed(), format!("{}  -", sha256(&data)));
    Ok(())
}

fn stdin_of_an_exec_that_ends_at_once_arrives_and_ends(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    // The client closes the input during the exec's start. Without any input, ctr may read the end
    // before its request to the shim, and then reports it to nobody.
    for round in 0..4 {
        let word = format!("word {round}");
        ensure_eq!(t.ctr().exec(&id, &["cat"]).stdin_bytes(word.clone().into_bytes()).ok()?.text(), word);
    }
    Ok(())
}

fn stdin_is_answered_line_by_line(t: &Test) -> Result<()> {
    let script = "echo ready; while read line; do echo \"got $line\"; done; echo end of input";
    let mut client = t.ctr().run(&t.id("c"), &["--rm"], &["sh", "-c", script]).spawn()?;
    client.sees("ready")?;
    for line in ["one", "two", "three"] {
        client.write(format!("{line}\n").as_bytes())?;
        client.sees(&format!("got {line}\n"))?;
    }
    client.close_stdin();
    ensure_eq!(client.wait()?.expect_code(0)?.text(), "ready\ngot one\ngot two\ngot three\nend of input\n");
    Ok(())
}

fn a_slow_reader_loses_nothing(t: &Test) -> Result<()> {
    let data = stream(2 << 20);
    let mount = shared_file(t, &data)?;
    // The client blocks on its stdout, a pipe read in bites with pauses. The FIFO behind it fills
    // up, and then the container blocks. The container ends after the last byte: runc's shim waits
    // for a reader at most two seconds after the end.
    let script = "cat /shared/data; while [ ! -e /shared/all-read ]; do sleep 0.05; done";
    let folder = t.folder()?.display();
    let ctr = t.ctr().run(&t.id("c"), &["--rm", "--mount", &mount], &["sh", "-c", &format!("'{script}'")]).line();
    let reader = format!("sleep 0.5; head -c 300000; sleep 0.5; head -c 1797152; touch {folder}/all-read; cat");
    let out = e2e::Cmd::new("sh").args(&["-c", &format!("{ctr} 2>/dev/null | ({reader})")]).ok()?;
    same_bytes(&out.stdout, &data)
}

fn a_terminal_has_the_clients_size_and_follows_it(t: &Test) -> Result<()> {
    let script = "tty; while [ ! -e /go ]; do stty size; sleep 0.05; done; exit 3";
    let id = t.id("c");
    let mut pty = Pty::spawn(&t.ctr().run(&id, &["--rm", "--tty"], &["sh", "-c", script]), 31, 91)?;
    pty.shows("/dev/pts/0")?;
    pty.shows("31 91")?;
    pty.resize(44, 132)?;
    pty.shows("44 132")?;
    // The exec may be killed before its end, because init ends on this.
    t.ctr().exec(&id, &["touch", "/go"]).run()?;
    pty.types("\n")?;
    ensure_eq!(pty.wait()?.0, 3);
    Ok(())
}

fn an_exec_has_a_terminal_of_its_own(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let script = "tty; stty size; read word; echo \"<$word>\"; exit 4";
    let exec = t.ctr().task(&["exec", "--tty", "--exec-id", &t.id("x"), &id, "sh", "-c", script]);
    let mut pty = Pty::spawn(&exec, 25, 85)?;
    pty.shows("/dev/pts/0")?;
    pty.types("hello\n")?;
    pty.shows("<hello>")?;
    ensure_eq!(pty.wait()?.0, 4);
    Ok(())
}

fn ctrl_c_on_the_terminal_interrupts_the_container(t: &Test) -> Result<()> {
    let script = "trap 'echo interrupted; exit 8' INT; echo ready to be interrupted; while :; do sleep 0.1; done";
    let mut pty = Pty::spawn(&t.ctr().run(&t.id("c"), &["--rm", "--tty"], &["sh", "-c", script]), 25, 80)?;
    pty.shows("ready to be interrupted")?;
    pty.types("\u{3}")?;
    ensure_eq!(pty.wait()?.0, 8);
    Ok(())
}

fn a_client_that_vanishes_leaves_the_container_running(t: &Test) -> Result<()> {
    let id = t.id("c");
    let script = "i=0; while :; do i=$((i+1)); echo line $i; echo $i >/new; mv /new /count; sleep 0.02; done";
    let pty = Pty::spawn(&t.ctr().run(&id, &["--tty"], &["sh", "-c", script]), 25, 80)?;
    pty.shows("line 3")?;
    pty.vanish()?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    let count = || -> Result<u64> { Ok(t.ctr().exec(&id, &["cat", "/count"]).ok()?.trimmed().parse()?) };
    let then = count()?;
    eventually("the container to go on", || {
        let now = count()?;
        ensure!(now > then, "still {now}");
        Ok(())
    })?;
    t.ctr().kill(&id, "SIGKILL")?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 137);
    Ok(())
}

fn a_file_log_has_everything(t: &Test) -> Result<()> {
    let data = stream(5 << 20);
    let (id, mount, log) = (t.id("c"), shared_file(t, &data)?, t.folder()?.join("logs/out.log"));
    let uri = format!("file://{}", log.display());
    let options = ["--detach", "--log-uri", &uri, "--mount", &mount];
    t.ctr().run(&id, &options, &["cat", "/shared/data"]).ok()?;
    t.ctr().becomes(&id, "STOPPED")?;
    eventually("the log to be complete", || same_bytes(&fs::read(&log)?, &data))
}

/// A logger as in containerd's documentation: stdout on 3, stderr on 4, ready by closing 5.
const LOGGER: &str = r#"
# A logger that wants its last lines survives the SIGTERM that comes with the deletion.
trap '' TERM
dir=$2
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" >$dir/who
# Children must not inherit 5: only its last close says "ready".
cat <&3 >$dir/stdout 5>&- &
cat <&4 >$dir/stderr 5>&- &
exec 5>&-
wait
echo done >$dir/done
"#;

fn logger(t: &Test) -> Result<String> {
    Ok(format!("binary://{}?to={}", t.script("logger", LOGGER)?, t.folder()?.display()))
}

fn a_binary_logger_gets_everything_and_knows_the_container(t: &Test) -> Result<()> {
    let data = stream(5 << 20);
    let (id, mount, uri) = (t.id("c"), shared_file(t, &data)?, logger(t)?);
    let options = ["--detach", "--log-uri", &uri, "--mount", &mount];
    t.ctr().run(&id, &options, &["sh", "-c", "echo oops >&2; cat /shared/data; exit 2"]).ok()?;
    t.ctr().becomes(&id, "STOPPED")?;
    let folder = t.folder()?;
    eventually("the log to be complete", || same_bytes(&fs::read(folder.join("stdout"))?, &data))?;
    ensure_eq!(fs::read_to_string(folder.join("stderr"))?, "oops\n");
    ensure_eq!(fs::read_to_string(folder.join("who"))?, format!("{id} default to {}\n", folder.display()));
    ensure_eq!(t.ctr().delete_task(&id)?, 2);
    // The logger is not killed: it ends after both streams.
    eventually("the logger to end", || Ok(fs::read(folder.join("done"))?))?;
    Ok(())
}

fn a_binary_logger_that_does_not_start_is_an_error(t: &Test) -> Result<()> {
    let id = t.id("c");
    let options = ["--detach", "--log-uri", "binary:///no/such/logger"];
    let out = t.ctr().run(&id, &options, &["true"]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "/no/such/logger");
    Ok(())
}

fn output_that_nobody_reads_does_not_block_deletion(t: &Test) -> Result<()> {
    let id = t.id("c");
    // Detached without --null-io: the FIFOs exist, and ctr has gone.
    t.ctr().run(&id, &["--detach"], &["sh", "-c", "while :; do echo nobody reads this; done"]).ok()?;
    let init = t.ctr().pid(&id)?;
    eventually("init to block on its full stdout", || {
        let state = e2e::proc::read(init, "wchan")?;
        ensure_eq!(e2e::proc::state(init)?, 'S', "in {state}");
        Ok(())
    })?;
    t.ctr().kill(&id, "SIGKILL")?;
    t.ctr().becomes(&id, "STOPPED")?;
    let out = t.ctr().task(&["rm", &id]).timeout(Duration::from_secs(60)).ok()?;
    ensure_has!(out.stderr, "137");
    Ok(())
}

fn a_second_client_can_attach(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().run(&id, &["--detach"], &["sh", "-c", "read line; echo \"got $line\"; read line; exit 5"]).ok()?;
    let mut client = t.ctr().task(&["attach", &id]).spawn()?;
    client.write(b"hello\n")?;
    client.sees("got hello")?;
    client.write(b"bye\n")?;
    client.wait()?.expect_code(5)?;
    Ok(())
}
