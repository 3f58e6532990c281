//! containerd's event stream, as printed by `ctr events`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cmd::Running;
use crate::{Test, eventually};

/// A subscription, from the first event served by containerd.
pub struct Events {
    stream: Running,
}

/// An event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Topic such as `/tasks/exit`.
    pub topic: String,
    /// Fields, named as in the protocol.
    pub body: Value,
}

impl Events {
    /// Subscribes.
    pub fn subscribe(test: &Test) -> Result<Self> {
        let stream = test.ctr().cmd().arg("events").spawn()?;
        // `ctr events` does not report the begin of its subscription: make events until one
        // arrives.
        let mut tries = 0;
        eventually("the first event of a subscription", || {
            tries += 1;
            test.ctr().cmd().args(&["namespaces", "label", "default", &format!("e2e-events={tries}")]).ok()?;
            ensure!(stream.stdout().contains("/namespaces/update"), "no event after {tries} label updates");
            Ok(())
        })?;
        Ok(Self { stream })
    }

    /// Events of this container's tasks so far, oldest first.
    pub fn of_task(&self, id: &str) -> Vec<Event> {
        let parsed = self.stream.stdout().lines().filter_map(parse).collect::<Vec<_>>();
        parsed.into_iter().filter(|e| e.topic.starts_with("/tasks/") && e.field("container_id") == id).collect()
    }

    /// Waits for an event of this container with that topic, then returns all events so far.
    pub fn of_task_until(&self, id: &str, topic: &str) -> Result<Vec<Event>> {
        eventually(&format!("{topic} of {id}"), || {
            let events = self.of_task(id);
            ensure!(events.iter().any(|e| e.topic == topic), "so far: {:?}", topics(&events));
            Ok(events)
        })
    }
}

impl Event {
    /// A text field, or "".
    pub fn field(&self, name: &str) -> &str {
        self.body.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// The exit status of `/tasks/exit`; protobuf leaves a zero out.
    pub fn exit_status(&self) -> u64 {
        self.body.get("exit_status").and_then(Value::as_u64).unwrap_or(0)
    }
}

/// The topics without `/tasks/`, to compare an order.
pub fn topics(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.topic.trim_start_matches("/tasks/")).collect()
}

/// The position of the first matching event.
pub fn position(events: &[Event], what: &str, fits: impl Fn(&Event) -> bool) -> Result<usize> {
    events.iter().position(fits).with_context(|| format!("no {what} in {events:?}"))
}

/// Parses `2026-01-02 03:04:05.6 +0000 UTC default /tasks/create {"container_id":"x"}`.
fn parse(line: &str) -> Option<Event> {
    let (head, body) = line.split_once('{')?;
    let topic = head.split_whitespace().find(|word| word.starts_with('/'))?;
    Some(Event { topic: topic.to_owned(), body: serde_json::from_str(&format!("{{{body}")).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ctr_events_is_understood() {
        let line = r#"2026-01-02 03:04:05.6 +0000 UTC default /tasks/exit {"container_id":"x","exit_status":137,"exited_at":{"seconds":1}}"#;
        let event = parse(line).unwrap();
        assert_eq!((event.topic.as_str(), event.field("container_id"), event.exit_status()), ("/tasks/exit", "x", 137));
        assert!(parse("no event").is_none());
    }
}
