//! Lines of JSON over a socket, one value each, for blocking code.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// This side of a conversation.
#[derive(Debug)]
pub struct Wire {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Wire {
    /// Returns this side of a conversation over a connected socket.
    ///
    /// # Errors
    /// Fails if the socket cannot be duplicated.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self { writer: socket.try_clone()?, reader: BufReader::new(socket) })
    }

    /// Returns the socket, for polling only. Nothing may be read from the socket.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.writer
    }

    /// Returns a second writer, for another thread.
    ///
    /// # Errors
    /// Fails if the socket cannot be duplicated.
    pub fn writer(&self) -> io::Result<UnixStream> {
        self.writer.try_clone()
    }

    /// Sends a value, in one write.
    ///
    /// # Errors
    /// Fails if the other side is gone.
    pub fn send(&mut self, value: &impl Serialize) -> io::Result<()> {
        send(&mut self.writer, value)
    }

    /// Waits for a value. `None` once the other side is gone.
    ///
    /// # Errors
    /// Fails if the line is no such value.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut line = String::new();
        // The socket of a killed process ends with or without an error.
        if matches!(self.reader.read_line(&mut line), Ok(0) | Err(_)) {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&line)?))
    }
}

/// Sends a value to a writer, in one write: lines of several threads do not mix.
///
/// # Errors
/// Fails if the other side is gone.
pub fn send(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_arrive_in_order_until_the_other_side_is_gone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (Wire::new(ours).unwrap(), Wire::new(theirs).unwrap());
        theirs.send(&1).unwrap();
        theirs.send(&vec!["a\nb"]).unwrap();
        drop(theirs);
        assert_eq!(ours.receive().unwrap(), Some(1));
        assert_eq!(ours.receive().unwrap(), Some(vec!["a\nb".to_owned()]));
        assert_eq!(ours.receive::<i32>().unwrap(), None);
    }

    #[test]
    fn garbage_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{nonsense\n").unwrap();
        Wire::new(ours).unwrap().receive::<i32>().unwrap_err();
    }
}
