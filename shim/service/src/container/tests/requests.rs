//! Early, late and repeated requests, and clients that disconnect.

use super::*;

#[tokio::test]
async fn a_client_that_goes_away_cancels_nothing() {
    let mut bench = Bench::created("sleep 1000").await;
    bench.hold().await;
    let service = Arc::clone(&bench.service);
    let start =
        tokio::spawn(
            async move { service.start(&ctx(), StartRequest { id: "c".into(), ..StartRequest::default() }).await },
        );
    tokio::task::yield_now().await;
    bench.status().await;
    start.abort();
    bench.let_go();
    bench.told("start").await;
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
}

#[tokio::test]
async fn requests_that_come_while_a_container_is_made_wait_for_it() {
    let bench = Bench::new("sleep 1000").await;
    bench.hold().await;
    let (creating, deleting) = (Arc::clone(&bench.service), Arc::clone(&bench.service));
    let (state, kill) = (Arc::clone(&bench.service), Arc::clone(&bench.service));
    let request = create_request(bench.bundle.path());
    let create = tokio::spawn(async move { creating.create(&ctx(), request).await });
    tokio::task::yield_now().await;
    assert_eq!(code(bench.create().await), Code::ALREADY_EXISTS);
    let request = StateRequest { id: "c".into(), ..StateRequest::default() };
    let state = tokio::spawn(async move { state.state(&ctx(), request).await });
    let request = KillRequest { id: "c".into(), signal: 9, ..KillRequest::default() };
    let kill = tokio::spawn(async move { kill.kill(&ctx(), request).await });
    let request = DeleteRequest { id: "c".into(), ..DeleteRequest::default() };
    let delete = tokio::spawn(async move { deleting.delete(&ctx(), request).await });
    tokio::task::yield_now().await;
    bench.shut_down().await;
    assert!(!state.is_finished() && !kill.is_finished() && !delete.is_finished());
    bench.let_go();
    create.await.unwrap().unwrap();
    state.await.unwrap().unwrap();
    kill.await.unwrap().unwrap();
    assert_eq!(delete.await.unwrap().unwrap().exit_status, 137);
    bench.exit.wait().await;
}

#[tokio::test]
async fn requests_for_a_container_that_could_not_be_made_are_not_found() {
    let bench = Bench::new("sleep 1000").await;
    bench.hold().await;
    bench.fail(Operation::Create);
    let (creating, deleting) = (Arc::clone(&bench.service), Arc::clone(&bench.service));
    let request = create_request(bench.bundle.path());
    let create = tokio::spawn(async move { creating.create(&ctx(), request).await });
    tokio::task::yield_now().await;
    let request = DeleteRequest { id: "c".into(), ..DeleteRequest::default() };
    let delete = tokio::spawn(async move { deleting.delete(&ctx(), request).await });
    tokio::task::yield_now().await;
    bench.let_go();
    create.await.unwrap().unwrap_err();
    assert_eq!(code(delete.await.unwrap()), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_container_is_removed_if_its_client_disconnects_during_the_creation() {
    let mut bench = Bench::new("sleep 1000").await;
    bench.hold().await;
    let service = Arc::clone(&bench.service);
    let request = create_request(bench.bundle.path());
    let create = tokio::spawn(async move { service.create(&ctx(), request).await });
    tokio::task::yield_now().await;
    create.abort();
    let _ = create.await;
    bench.let_go();
    assert_eq!(bench.told("delete").await, ["create", "exit c", "delete"]);
    // Nobody knows of the shim: it ends without a request.
    bench.exit.wait().await;
}

#[tokio::test]
async fn a_deletion_finishes_after_its_client_has_disconnected() {
    let mut bench = Bench::started("exit 0").await;
    bench.wait("").await;
    bench.hold().await;
    let service = Arc::clone(&bench.service);
    let request = DeleteRequest { id: "c".into(), ..DeleteRequest::default() };
    let delete = tokio::spawn(async move { service.delete(&ctx(), request).await });
    tokio::task::yield_now().await;
    bench.status().await;
    delete.abort();
    let _ = delete.await;
    bench.let_go();
    bench.told("delete").await;
    // Nobody knows of the shim any more: it ends without a request.
    bench.exit.wait().await;
}

#[tokio::test]
async fn requests_that_wait_for_a_deletion_are_not_found() {
    let bench = Bench::started("exit 0").await;
    bench.wait("").await;
    bench.hold().await;
    let (first, second) = (Arc::clone(&bench.service), Arc::clone(&bench.service));
    let delete = || DeleteRequest { id: "c".into(), ..DeleteRequest::default() };
    let (request, other) = (delete(), delete());
    let first = tokio::spawn(async move { first.delete(&ctx(), request).await });
    let second = tokio::spawn(async move { second.delete(&ctx(), other).await });
    tokio::task::yield_now().await;
    bench.status().await;
    bench.let_go();
    first.await.unwrap().unwrap();
    assert_eq!(code(second.await.unwrap()), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_failed_create_leaves_nothing_and_its_id_is_free() {
    let bench = Bench::new("exit 0").await;
    bench.fail(Operation::Create);
    assert!(bench.create().await.unwrap_err().to_string().contains("as told"));
    *bench.runtime.fail.lock().unwrap() = None;
    bench.create().await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::CREATED);
}

#[tokio::test]
async fn a_creation_that_panics_gives_its_id_back() {
    let bench = Bench::new(PANIC).await;
    assert_eq!(code(bench.create().await), Code::UNKNOWN);
    assert_eq!(code(bench.create().await), Code::UNKNOWN, "not that the id is taken");
    bench.shut_down().await;
    bench.exit.wait().await;
}

#[tokio::test]
async fn a_failed_delete_can_be_tried_again() {
    let bench = Bench::started("exit 0").await;
    bench.wait("").await;
    bench.fail(Operation::Delete);
    bench.delete("").await.unwrap_err();
    *bench.runtime.fail.lock().unwrap() = None;
    bench.delete("").await.unwrap();
    assert_eq!(*bench.runtime.deletes.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_delete_delivers_the_output_also_when_one_before_it_has_failed() {
    let folder = stdio::tests::fifos();
    let out = folder.path().join("out");
    let bench = Bench::new("head -c 100000 /dev/zero").await;
    let mut request = create_request(bench.bundle.path());
    request.stdout = out.to_str().unwrap().into();
    bench.service.create(&ctx(), request).await.unwrap();
    bench.start("").await.unwrap();
    // The process ends; a part of its output does not fit into the fifo, and nobody reads.
    bench.wait("").await;
    bench.fail(Operation::Delete);
    bench.delete("").await.unwrap_err();
    *bench.runtime.fail.lock().unwrap() = None;
    let service = Arc::clone(&bench.service);
    let request = DeleteRequest { id: "c".into(), ..DeleteRequest::default() };
    let delete = tokio::spawn(async move { service.delete(&ctx(), request).await });
    while *bench.runtime.deletes.lock().unwrap() == 0 {
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        bench.status().await;
    }
    assert!(!delete.is_finished(), "before all output is delivered");
    let read = move || std::fs::read(out).unwrap().len();
    assert_eq!(tokio::task::spawn_blocking(read).await.unwrap(), 100_000);
    delete.await.unwrap().unwrap();
}

#[tokio::test]
async fn statistics_are_there_until_the_container_is_deleted() {
    let bench = Bench::started("exit 0").await;
    bench.wait("").await;
    assert_eq!(bench.status().await, ApiStatus::STOPPED);
    bench.stats().await.unwrap();
    bench.delete("").await.unwrap();
    assert_eq!(code(bench.stats().await), Code::NOT_FOUND);
}
