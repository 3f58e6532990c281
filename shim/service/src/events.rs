//! Events to containerd, in the order in which they happened.
//!
//! containerd may be away: it restarts, and its containers run on. Events wait here, in order, until it answers again.
//! (containerd-shim's own publisher retries each event by itself, which reorders them, and gives up after 15 s.)

use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::{self, context};
use tokio::sync::{mpsc, oneshot};

/// Events kept while containerd is away, as many as containerd's Go shim keeps.
const QUEUE: usize = 2048;
/// One delivery; as in containerd's Go shim.
const TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What containerd refuses is wrong with the event, not with the connection: it is dropped after as many tries.
const REFUSALS: u32 = 5;

/// Where events go. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

#[derive(Debug)]
enum Item {
    Event(Envelope),
    /// Answered once all events before it are with containerd.
    Drained(oneshot::Sender<()>),
}

impl Events {
    /// Starts delivering to the ttrpc socket at `address`.
    pub(crate) fn start(address: &str, namespace: &str) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        tokio::spawn(deliver(address.to_owned(), events));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Events that go nowhere but to a test, by topic.
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

    /// Queues an event. Never waits: what containerd does not take must not hold up a container.
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

    /// Waits until containerd has taken everything, at most `limit`.
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

async fn deliver(address: String, mut events: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = events.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Drained(answer) => {
                // Whoever asked may have stopped waiting.
                let _ = answer.send(());
                continue;
            }
        };
        let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
        let mut pause = FIRST_PAUSE;
        let mut refusals = 0;
        while let Err(error) = forward(&mut client, &address, &request).await {
            if let ttrpc::Error::RpcStatus(status) = &error {
                refusals += 1;
                if refusals >= REFUSALS {
                    tracing::error!("containerd refuses event {}: {}", request.envelope.topic, status.message);
                    break;
                }
            } else {
                client = None;
            }
            tracing::debug!("event {} waits: {error}", request.envelope.topic);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
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
