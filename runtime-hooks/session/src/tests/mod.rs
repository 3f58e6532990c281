mod client;
mod faults;
mod successor;
