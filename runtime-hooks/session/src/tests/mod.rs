mod client;
mod faults;
