//! Execs: input, and the start beside other operations.

use super::*;

#[tokio::test]
async fn parallel_execs_keep_their_codes() {
    let bench = Bench::started("sleep 1000").await;
    for n in 0..20 {
        bench.exec(&format!("e{n}"), &format!("exit {n}")).await.unwrap();
    }
    for n in (0..20).rev() {
        assert_eq!(bench.wait(&format!("e{n}")).await, n);
        assert_eq!(bench.delete(&format!("e{n}")).await.unwrap(), n);
    }
}

#[tokio::test]
async fn input_that_ends_while_an_exec_is_started_ends_for_the_exec() {
    let bench = Bench::started("sleep 1000").await;
    let folder = stdio::tests::fifos();
    let stdin = folder.path().join("in");
    bench
        .add_exec_with_input("e", "read word && [ $word = abc ] && ! read more", stdin.to_str().unwrap())
        .await
        .unwrap();
    let start = bench.held_start("e").await;
    OpenOptions::new().write(true).open(&stdin).unwrap().write_all(b"abc\n").unwrap();
    bench.close_stdin("e").await;
    bench.let_go();
    start.await.unwrap().unwrap();
    assert_eq!(bench.wait("e").await, 0);
}

#[tokio::test]
async fn input_closed_before_the_start_of_an_exec_stays_closed_for_every_attempt() {
    let bench = Bench::started("sleep 1000").await;
    let folder = stdio::tests::fifos();
    let stdin = folder.path().join("in");
    bench.add_exec_with_input("e", "! read word", stdin.to_str().unwrap()).await.unwrap();
    bench.close_stdin("e").await;
    bench.fail(Operation::Exec);
    bench.start("e").await.unwrap_err();
    *bench.runtime.fail.lock().unwrap() = None;
    bench.start("e").await.unwrap();
    assert_eq!(bench.wait("e").await, 0);
}

#[tokio::test]
async fn a_failed_start_does_not_end_the_input_of_the_next() {
    let bench = Bench::started("sleep 1000").await;
    let folder = stdio::tests::fifos();
    let stdin = folder.path().join("in");
    bench.add_exec_with_input("e", "read word", stdin.to_str().unwrap()).await.unwrap();
    bench.fail(Operation::Exec);
    bench.start("e").await.unwrap_err();
    *bench.runtime.fail.lock().unwrap() = None;
    bench.start("e").await.unwrap();
    OpenOptions::new().write(true).open(&stdin).unwrap().write_all(b"abc\n").unwrap();
    assert_eq!(bench.wait("e").await, 0);
}

#[tokio::test]
async fn an_exec_that_hangs_in_its_start_holds_up_no_other_operation() {
    let bench = Bench::started("sleep 1000").await;
    let hanging = bench.hanging_exec("h").await;
    bench.exec("e", "exit 7").await.unwrap();
    assert_eq!(bench.wait("e").await, 7);
    bench.pause().await.unwrap();
    assert_eq!(bench.delete("e").await.unwrap(), 7);
    bench.resume().await.unwrap();
    assert!(!hanging.is_finished());
    bench.runtime.execs.add_permits(1);
    hanging.await.unwrap().unwrap();
    assert_eq!(bench.wait("h").await, 0);
}

#[tokio::test]
async fn the_exit_of_init_is_told_after_the_start_of_an_exec() {
    let mut bench = Bench::started("sleep 1000").await;
    let hanging = bench.hanging_exec("h").await;
    bench.kill("", 9).await.unwrap();
    while bench.kill("", 0).await.is_ok() {
        tokio::task::yield_now().await;
    }
    bench.runtime.execs.add_permits(1);
    hanging.await.unwrap().unwrap();
    assert_eq!(bench.wait("").await, 137);
    assert_eq!(bench.told("exit c").await, ["create", "start", "exec-added", "exec-started", "exit h", "exit c"]);
}

#[tokio::test]
async fn an_exec_may_run_before_init_does() {
    let bench = Bench::created("sleep 1000").await;
    bench.exec("e", "exit 3").await.unwrap();
    assert_eq!(bench.wait("e").await, 3);
    assert_eq!(bench.status().await, ApiStatus::CREATED);
    bench.start("").await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
}

#[tokio::test]
async fn a_failed_exec_can_be_removed() {
    let bench = Bench::started("sleep 1000").await;
    bench.fail(Operation::Exec);
    bench.exec("e", "true").await.unwrap_err();
    bench.delete("e").await.unwrap();
    assert_eq!(code(bench.delete("e").await), Code::NOT_FOUND);
}
