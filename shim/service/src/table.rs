//! Table of the containers that a shim serves.
//!
//! ```text
//!   register ──► Creating ── ready ──► Ready ── the container is deleted ──► (no entry)
//!                   └── creation fails, or panics ───────────────────────────────▲
//! ```
//!
//! A request finds its container here. No request removes an entry: its [`Registration`] does, which belongs to the
//! creation first and to the container's actor then. Thus an entry goes with its container, also when the client that
//! asked for the deletion has gone away meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use tokio::sync::watch;

use crate::container::Container;
use crate::error::TaskError;

/// Handle to the table. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Table {
    state: Arc<watch::Sender<State>>,
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Entry>,
    /// Requests under way that remove a container.
    removals: usize,
}

enum Entry {
    Creating,
    Ready(Container),
}

impl State {
    /// Returns true if no entry is about to come or go.
    fn is_at_rest(&self) -> bool {
        self.removals == 0 && self.entries.values().all(|entry| matches!(entry, Entry::Ready(_)))
    }
}

impl Table {
    /// Takes an id for a container that is about to be made.
    pub(crate) fn register(&self, id: &str) -> Result<Registration, TaskError> {
        let is_new = self.state.send_if_modified(|state| {
            let is_new = !state.entries.contains_key(id);
            if is_new {
                state.entries.insert(id.to_owned(), Entry::Creating);
            }
            is_new
        });
        if is_new {
            Ok(Registration { state: Arc::downgrade(&self.state), id: id.to_owned() })
        } else {
            Err(TaskError::ContainerExists { container: id.to_owned() })
        }
    }

    /// Returns a container, once it is made.
    ///
    /// containerd asks for a container whose creation has taken too long, and for all after its own restart. It takes
    /// "not found" for "nothing is there", and forgets what appears later.
    pub(crate) async fn get(&self, id: &str) -> Result<Container, TaskError> {
        let mut state = self.state.subscribe();
        let settled = state.wait_for(|state| !matches!(state.entries.get(id), Some(Entry::Creating))).await;
        match settled.ok().and_then(|state| match state.entries.get(id) {
            Some(Entry::Ready(container)) => Some(container.clone()),
            _ => None,
        }) {
            Some(container) => Ok(container),
            None => Err(TaskError::NoContainer { container: id.to_owned() }),
        }
    }

    /// Lets requests find a container that was registered.
    pub(crate) fn ready(&self, container: &Container) {
        self.state.send_modify(|state| {
            // Gone if its actor has ended already.
            if let Some(entry) = state.entries.get_mut(container.id()) {
                *entry = Entry::Ready(container.clone());
            }
        });
    }

    /// Announces a request that removes a container.
    pub(crate) fn removal(&self) -> Removal {
        self.state.send_modify(|state| state.removals += 1);
        Removal { state: Arc::clone(&self.state) }
    }

    /// Returns true if nothing is being made or removed.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.state.borrow().is_at_rest()
    }

    /// Waits until nothing is being made or removed; returns whether no container is left then.
    pub(crate) async fn is_empty_at_rest(&self) -> bool {
        self.state.subscribe().wait_for(State::is_at_rest).await.is_ok_and(|state| state.entries.is_empty())
    }
}

/// The right to an id, and its entry in the table. The entry goes with it.
pub(crate) struct Registration {
    state: Weak<watch::Sender<State>>,
    id: String,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(state) = self.state.upgrade() {
            state.send_modify(|state| drop(state.entries.remove(&self.id)));
        }
    }
}

/// While it lives, a container may still go.
pub(crate) struct Removal {
    state: Arc<watch::Sender<State>>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.state.send_modify(|state| state.removals -= 1);
    }
}
