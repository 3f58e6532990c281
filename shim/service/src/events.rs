//! Events to containerd, in order of occurrence.
//!
//! containerd may restart while containers run on. Events wait here, in order, until containerd
//! answers again. (containerd-shim's own publisher retries each event separately, which breaks the
//! order, and gives up after 15 s.)

use std::time::{Duration, Instant};

use containerd_shim::event::Event;
use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::{self, Code, context};
use tokio::sync::{mpsc, oneshot};

/// Events kept while containerd is away, as many as containerd's Go shim keeps.
const QUEUE: usize = 2048;
/// Time limit of one delivery, as in containerd's Go shim.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Limits of the retries for one event.
#[derive(Clone, Copy, Debug)]
struct Patience {
    first_pause: Duration,
    longest_pause: Duration,
    /// Time after which a refused event is dropped. Later events wait meanwhile.
    refused: Duration,
}

/// Limits of containerd's Go shim, 15 s in all.
const PATIENCE: Patience = Patience {
    first_pause: Duration::from_millis(50),
    longest_pause: Duration::from_secs(2),
    refused: Duration::from_secs(15),
};

/// Queue of events to containerd. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

#[derive(Debug)]
enum Item {
    Event(Envelope),
    /// Answered after delivery of all events before.
    Drained(oneshot::Sender<()>),
}

impl Events {
    /// Starts delivering to the ttrpc socket at `address`.
    pub(crate) fn start(address: &str, namespace: &str) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        tokio::spawn(deliver(address.to_owned(), events, PATIENCE));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Returns a queue whose events go only to a test.
    #[cfg(test)]
    pub(crate) fn for_test() -> (Self, mpsc::UnboundedReceiver<Envelope>) {
        let (queue, mut items) = mpsc::channel(QUEUE);
        let (envelopes, told) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Item::Event(envelope)) = items.recv().await {
                envelopes.send(envelope).ok();
            }
        });
        (Self { namespace: "test".into(), queue }, told)
    }

    /// Queues an event. Never waits: a slow containerd must not hold up a container.
    pub(crate) fn publish<E: Event + 'static>(&self, event: E) {
        let topic = event.topic();
        let envelope = (|| {
            Ok::<_, containerd_shim::Error>(Envelope {
                timestamp: Some(timestamp()?).into(),
                namespace: self.namespace.clone(),
                topic: topic.clone(),
                event: Some(convert_to_any(Box::new(event))?).into(),
                ..Envelope::default()
            })
        })();
        match envelope {
            Ok(envelope) => {
                if self.queue.try_send(Item::Event(envelope)).is_err() {
                    tracing::error!("event {topic} is lost: containerd has not taken {QUEUE} events before it");
                }
            }
            Err(error) => tracing::error!("event {topic} is lost: {error}"),
        }
    }

    /// Waits until containerd has accepted everything, at most `limit`.
    pub(crate) async fn drain(&self, limit: Duration) {
        let (drained, answer) = oneshot::channel();
        let sent = async {
            self.queue.send(Item::Drained(drained)).await.ok()?;
            answer.await.ok()
        };
        if tokio::time::timeout(limit, sent).await.is_err() {
            tracing::warn!("containerd did not take the last events within {limit:?}");
        }
    }
}

async fn deliver(address: String, mut events: mpsc::Receiver<Item>, patience: Patience) {
    let mut client = None;
    while let Some(item) = events.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Drained(answer) => {
                // The shim may have stopped waiting.
                let _ = answer.send(());
                continue;
            }
        };
        let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
        let mut pause = patience.first_pause;
        let mut refused_since: Option<Instant> = None;
        while let Err(error) = forward(&mut client, &address, &request).await {
            match Obstacle::of(&error) {
                Obstacle::Away => client = None,
                Obstacle::Unavailable => refused_since = None,
                Obstacle::Refusal if refused_since.get_or_insert_with(Instant::now).elapsed() < patience.refused => {}
                Obstacle::Refusal | Obstacle::Malformed => {
                    tracing::error!("containerd refuses event {}, which is lost: {error}", request.envelope.topic);
                    break;
                }
            }
            tracing::debug!("event {} waits: {error}", request.envelope.topic);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(patience.longest_pause);
        }
    }
}

/// Obstacle to the delivery of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    /// Nobody listens, or the connection has ended.
    Away,
    /// containerd listens, and is not ready: treated as away.
    Unavailable,
    /// containerd refused the event, and may accept it later.
    Refusal,
    /// No repetition helps.
    Malformed,
}

impl Obstacle {
    fn of(error: &ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else { return Self::Away };
        match status.code.enum_value() {
            Ok(Code::UNAVAILABLE) => Self::Unavailable,
            Ok(Code::INVALID_ARGUMENT) => Self::Malformed,
            _ => Self::Refusal,
        }
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, request: &ForwardRequest) -> ttrpc::Result<()> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(&unix(address)).await?)),
    };
    let timeout = i64::try_from(TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
    connected.forward(context::with_timeout(timeout), request).await.map(drop)
}

fn unix(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("unix://{address}") }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
    use containerd_shim_protos::shim_async::{Events as EventsService, create_events};
    use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// A containerd with a list of answers, and success after the last.
    struct Containerd {
        answers: Mutex<VecDeque<Code>>,
        tries: mpsc::UnboundedSender<String>,
        taken: mpsc::UnboundedSender<String>,
    }

    #[async_trait]
    impl EventsService for Containerd {
        async fn forward(&self, _ctx: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let topic = request.envelope.topic.clone();
            self.tries.send(topic.clone()).unwrap();
            let answer = self.answers.lock().unwrap().pop_front();
            match answer {
                Some(code) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "as told"))),
                None => {
                    self.taken.send(topic).unwrap();
                    Ok(Empty::new())
                }
            }
        }
    }

    struct Bench {
        events: mpsc::Sender<Item>,
        tries: mpsc::UnboundedReceiver<String>,
        taken: mpsc::UnboundedReceiver<String>,
        _server: Server,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        async fn new(answers: impl IntoIterator<Item = Code>, refused: Duration) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let address = format!("unix://{}", folder.path().join("s").display());
            let (tries, tried) = mpsc::unbounded_channel();
            let (takes, taken) = mpsc::unbounded_channel();
            let answers = Mutex::new(answers.into_iter().collect());
            let service = create_events(Arc::new(Containerd { answers, tries, taken: takes }));
            let mut server = Server::new().bind(&address).unwrap().register_service(service);
            server.start().await.unwrap();
            let (events, items) = mpsc::channel(QUEUE);
            let pause = Duration::from_millis(1);
            tokio::spawn(deliver(address, items, Patience { first_pause: pause, longest_pause: pause, refused }));
            Self { events, tries: tried, taken, _server: server, _folder: folder }
        }

        async fn publish(&self, topic: &str) {
            let envelope = Envelope { topic: topic.to_owned(), ..Envelope::default() };
            self.events.send(Item::Event(envelope)).await.unwrap();
        }
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn an_event_outlasts_refusals_of_every_kind_and_keeps_its_place() {
        let kinds = [Code::UNAVAILABLE, Code::DEADLINE_EXCEEDED, Code::UNKNOWN, Code::FAILED_PRECONDITION];
        let mut bench = Bench::new(kinds.into_iter().cycle().take(20), LONG).await;
        bench.publish("exit").await;
        bench.publish("delete").await;
        assert_eq!(bench.taken.recv().await.unwrap(), "exit");
        assert_eq!(bench.taken.recv().await.unwrap(), "delete");
    }

    #[tokio::test]
    async fn a_malformed_event_is_dropped_at_once() {
        let mut bench = Bench::new([Code::INVALID_ARGUMENT], LONG).await;
        bench.publish("malformed").await;
        bench.publish("exit").await;
        assert_eq!(bench.taken.recv().await.unwrap(), "exit");
        assert_eq!(bench.tries.recv().await.unwrap(), "malformed");
        assert_eq!(bench.tries.recv().await.unwrap(), "exit");
    }

    #[tokio::test]
    async fn an_event_that_is_refused_for_good_does_not_hold_up_the_others() {
        let mut bench = Bench::new([Code::UNKNOWN], Duration::ZERO).await;
        bench.publish("refused").await;
        bench.publish("exit").await;
        assert_eq!(bench.taken.recv().await.unwrap(), "exit");
    }

    #[tokio::test]
    async fn a_containerd_that_is_not_ready_refuses_nothing() {
        let mut bench = Bench::new([Code::UNAVAILABLE; 5], Duration::ZERO).await;
        bench.publish("exit").await;
        assert_eq!(bench.taken.recv().await.unwrap(), "exit");
    }
}
