//! Table of a shim's containers.
//!
//! ```text
//!   register ──► Creating ── ready ──► Ready ── the container is deleted ──► (no entry)
//!                   └── creation fails, or panics ───────────────────────────────▲
//! ```
//!
//! A request finds its container here. An entry ends with its [`Registration`], owned by the
//! creation first and by the container's actor then. Thus an entry goes with its container, even
//! after the disconnect of the client behind the deletion.

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
    /// Running requests to remove a container.
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
    /// Reserves an id for a container to be made.
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

    /// Returns a container, once made.
    ///
    /// containerd asks for a container after too long a creation, and for all after its own
    /// restart. To containerd, "not found" means "nothing is there"; anything made later is
    /// forgotten.
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

    /// Makes a registered container visible to requests.
    pub(crate) fn ready(&self, container: &Container) {
        self.state.send_modify(|state| {
            // Gone if its actor has ended already.
            if let Some(entry) = state.entries.get_mut(container.id()) {
                *entry = Entry::Ready(container.clone());
            }
        });
    }

    /// Announces a request to remove a container.
    pub(crate) fn removal(&self) -> Removal {
        self.state.send_modify(|state| state.removals += 1);
        Removal { state: Arc::clone(&self.state) }
    }

    /// Returns true if no creation or removal is under way.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.state.borrow().is_at_rest()
    }

    /// Waits until no creation or removal is under way; returns whether the table is empty then.
    pub(crate) async fn is_empty_at_rest(&self) -> bool {
        self.state.subscribe().wait_for(State::is_at_rest).await.is_ok_and(|state| state.entries.is_empty())
    }
}

/// The right to an id, and its entry in the table. Dropped, the entry is removed.
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

/// Running request to remove a container, counted while this value lives.
pub(crate) struct Removal {
    state: Arc<watch::Sender<State>>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.state.send_modify(|state| state.removals -= 1);
    }
}
