//! Format of image files: magic numbers, then entries, each a length and a protobuf message.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use protobuf::rt::WireType;
use protobuf::{CodedInputStream, CodedOutputStream};
use rustix::fs::{Mode, OFlags};

use crate::format::{ImageError, damaged};

/// Longest entry, in bytes: some ten to hundred bytes are usual. Longer kinds have a limit of their
/// own.
pub(crate) const MAX_ENTRY: u32 = 1 << 20;

/// Reads an image file's entries.
pub(crate) struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
}

impl<'a> Reader<'a> {
    pub(crate) fn open(path: &'a Path, magic: &[u32]) -> Result<Self, ImageError> {
        let mut reader = Self { path, file: BufReader::new(open(path)?) };
        for expected in magic {
            match reader.word()? {
                Some(found) if found == *expected => {}
                Some(_) => return Err(damaged(path, "it does not begin as CRIU's files do")),
                None => return Err(damaged(path, "it is cut off")),
            }
        }
        Ok(reader)
    }

    /// Returns the next entry, of at most `most` bytes; `None` at the end of the file.
    pub(crate) fn entry(&mut self, most: u32) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(length) = self.word()? else { return Ok(None) };
        if length > most {
            return Err(damaged(self.path, "an entry is too long"));
        }
        let mut entry = vec![];
        let read = (&mut self.file).take(length.into()).read_to_end(&mut entry).map_err(|error| self.short(error))?;
        match u32::try_from(read) {
            Ok(read) if read == length => Ok(Some(entry)),
            _ => Err(damaged(self.path, "it is cut off")),
        }
    }

    /// Returns the next word; `None` at the end of the file.
    fn word(&mut self) -> Result<Option<u32>, ImageError> {
        let mut bytes = [0; 4];
        let read = self.file.read(&mut bytes).map_err(|error| self.short(error))?;
        if read == 0 {
            return Ok(None);
        }
        self.file.read_exact(&mut bytes[read..]).map_err(|error| self.short(error))?;
        Ok(Some(u32::from_le_bytes(bytes)))
    }

    fn short(&self, source: io::Error) -> ImageError {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => damaged(self.path, "it is cut off"),
            _ => ImageError::Read { path: self.path.to_owned(), source },
        }
    }
}

/// Returns the first entry of an image file, of at most `most` bytes.
pub(crate) fn first_entry(path: &Path, magic: &[u32], most: u32) -> Result<Vec<u8>, ImageError> {
    Reader::open(path, magic)?.entry(most)?.ok_or_else(|| damaged(path, "it is cut off"))
}

pub(crate) fn open(path: &Path) -> Result<File, ImageError> {
    let failed = |source| ImageError::Read { path: path.to_owned(), source };
    // Not through a link, and without waiting for a fifo's other end.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let file = File::from(file);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(damaged(path, "it is not a regular file"));
    }
    Ok(file)
}

/// Writes magic numbers.
pub(crate) fn write_magic(out: &mut impl Write, magic: &[u32]) -> io::Result<()> {
    magic.iter().try_for_each(|word| out.write_all(&word.to_le_bytes()))
}

/// Writes an entry.
pub(crate) fn write_entry(out: &mut impl Write, entry: &[u8]) -> io::Result<()> {
    let length = u32::try_from(entry.len()).map_err(io::Error::other)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(entry)
}

/// A field of a message.
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
    /// The whole field, tag included.
    pub(crate) raw: &'a [u8],
}

pub(crate) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

/// Calls `each` for a message's fields, in order.
pub(crate) fn fields<'a>(
    path: &Path,
    message: &'a [u8],
    mut each: impl FnMut(Field<'a>) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let broken = || damaged(path, "an entry is not a message");
    let mut input = CodedInputStream::from_bytes(message);
    let mut rest = message;
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(|_| broken())? {
        let wire_type = WireType::new(tag & 7).ok_or_else(broken)?;
        let number = match wire_type {
            WireType::Varint => Some(input.read_uint64().map_err(|_| broken())?),
            _ => {
                input.skip_field(wire_type).map_err(|_| broken())?;
                None
            }
        };
        let end = usize::try_from(input.pos()).map_err(|_| broken())?;
        let (raw, after) = rest.split_at_checked(end - (message.len() - rest.len())).ok_or_else(broken)?;
        rest = after;
        let value = match (wire_type, number) {
            (_, Some(number)) => Value::Number(number),
            (WireType::LengthDelimited, None) => Value::Bytes(content(raw).ok_or_else(broken)?),
            _ => Value::Other,
        };
        each(Field { number: tag >> 3, value, raw })?;
    }
    Ok(())
}

/// Returns the contents of a field of bytes, without the tag and the length.
fn content(raw: &[u8]) -> Option<&[u8]> {
    let mut input = CodedInputStream::from_bytes(raw);
    input.read_raw_varint32().ok()?;
    input.read_raw_varint32().ok()?;
    raw.get(usize::try_from(input.pos()).ok()?..)
}

/// Appends a field that is a number.
pub(crate) fn put_number(message: &mut Vec<u8>, number: u32, value: u64) {
    let mut out = CodedOutputStream::vec(message);
    out.write_uint64(number, value).expect("a Vec takes everything");
    out.flush().expect("a Vec takes everything");
}

/// Appends a field that is a signed number, in zigzag form.
pub(crate) fn put_signed(message: &mut Vec<u8>, number: u32, value: i32) {
    let mut out = CodedOutputStream::vec(message);
    out.write_sint32(number, value).expect("a Vec takes everything");
    out.flush().expect("a Vec takes everything");
}

/// Appends a field that is a message.
pub(crate) fn put_message(message: &mut Vec<u8>, number: u32, value: &[u8]) {
    let mut out = CodedOutputStream::vec(message);
    out.write_bytes(number, value).expect("a Vec takes everything");
    out.flush().expect("a Vec takes everything");
}

/// Returns the message with some numbers changed, and everything else unchanged.
pub(crate) fn with_numbers(path: &Path, message: &[u8], changed: &[(u32, u64)]) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![];
    fields(path, message, |field| {
        match changed.iter().find(|(number, _)| *number == field.number) {
            Some((number, value)) => put_number(&mut bytes, *number, *value),
            None => bytes.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    Ok(bytes)
}
