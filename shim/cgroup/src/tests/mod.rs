//! What needs more than one function: fixtures of both versions' files, and the real hierarchies of this machine.

mod fixture;
mod live;
