//! Bounded decoder of `text/event-stream` (WHATWG HTML §9.2).

use std::fmt;

const STALE: &str = "stale";
const GO: &str = "go";
const WAIT: &str = "wait";

/// Meaning of a comment; each is a heartbeat.
#[derive(Debug, PartialEq, Eq, Clone)]
pub enum Word<'a> {
    /// Heartbeat only.
    Here,
    /// A frame is pending.
    Wait,
    /// The hub lost its source, with details.
    Stale(&'a str),
    /// The hub is shutting down; reconnect to these base URLs, if any.
    Go(Vec<&'a str>),
}

impl<'a> Word<'a> {
    /// Parses a comment.
    pub fn of(comment: &'a str) -> Self {
        match comment.split_once(' ').unwrap_or((comment, "")) {
            (WAIT, _) => Self::Wait,
            (STALE, details) => Self::Stale(details),
            (GO, urls) => Self::Go(urls.split_whitespace().collect()),
            _ => Self::Here,
        }
    }
}

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here => Ok(()),
            Self::Wait => f.write_str(WAIT),
            Self::Stale(details) => write!(f, "{STALE} {details}"),
            Self::Go(urls) => [&[GO], &urls[..]].concat().join(" ").fmt(f),
        }
    }
}

/// Event or comment.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// Text after the colon.
    Comment(String),
    /// Complete event.
    Event {
        /// Revision after the event.
        id: String,
        /// Event name.
        event: String,
        /// Payload.
        data: Vec<u8>,
    },
}

/// Decoding error.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Limit exceeded.
    #[error("event exceeds {max} bytes")]
    TooLong {
        /// Limit in bytes.
        max: usize,
    },
    /// Text is not UTF-8.
    #[error("event id, event name or comment is not UTF-8")]
    NotText,
}

/// Decoder: [`push`](Self::push) chunks, then drain with [`next`](Self::next).
pub struct Decoder {
    max: usize,
    /// Input, of which `read` bytes are consumed.
    buffer: Vec<u8>,
    read: usize,
    /// Avoids searching a long line again.
    searched: usize,
    id: String,
    event: String,
    data: Vec<u8>,
    has_data: bool,
}

impl Decoder {
    /// Limits events to `max` bytes.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            buffer: Vec::new(),
            read: 0,
            searched: 0,
            id: String::new(),
            event: String::new(),
            data: Vec::new(),
            has_data: false,
        }
    }

    /// Whether all input is consumed.
    pub fn is_drained(&self) -> bool {
        self.read == self.buffer.len()
    }

    /// Appends a network chunk.
    pub fn push(&mut self, chunk: &[u8]) {
        self.buffer.drain(..self.read);
        self.searched -= self.read;
        self.read = 0;
        self.buffer.extend_from_slice(chunk);
    }

    /// Next complete message.
    #[expect(
        clippy::should_implement_trait,
        reason = "decoding ends at an error, which an Iterator would hide"
    )]
    pub fn next(&mut self) -> Result<Option<Message>, Error> {
        while let Some(end) = self.line_end() {
            let line = &self.buffer[self.read..end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let (field, value) = match line.iter().position(|b| *b == b':') {
                None => (line, &[][..]),
                Some(colon) => {
                    (&line[..colon], line[colon + 1..].strip_prefix(b" ").unwrap_or(&line[colon + 1..]))
                }
            };
            let message = match field {
                b"" if line.is_empty() => self.has_data.then(|| Message::Event {
                    id: self.id.clone(),
                    event: std::mem::take(&mut self.event),
                    data: std::mem::take(&mut self.data),
                }),
                b"" => Some(Message::Comment(text(value)?)),
                b"id" => {
                    self.id = text(value)?;
                    None
                }
                b"event" => {
                    self.event = text(value)?;
                    None
                }
                b"data" => {
                    if self.has_data {
                        self.data.push(b'\n');
                    }
                    self.has_data = true;
                    self.data.extend_from_slice(value);
                    None
                }
                _ => None,
            };
            if line.is_empty() {
                self.has_data = false;
                self.event.clear();
            }
            self.read = end + 1;
            if self.data.len() > self.max {
                return Err(Error::TooLong { max: self.max });
            }
            if message.is_some() {
                return Ok(message);
            }
        }
        if self.buffer.len() - self.read > self.max {
            return Err(Error::TooLong { max: self.max });
        }
        Ok(None)
    }

    fn line_end(&mut self) -> Option<usize> {
        let from = self.searched.max(self.read);
        let found = self.buffer[from..].iter().position(|b| *b == b'\n').map(|offset| from + offset);
        self.searched = found.map_or(self.buffer.len(), |end| end + 1);
        found
    }
}

fn text(bytes: &[u8]) -> Result<String, Error> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Error::NotText)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(chunks: &[&[u8]], max: usize) -> Result<Vec<Message>, Error> {
        let mut decoder = Decoder::new(max);
        let mut messages = Vec::new();
        for chunk in chunks {
            decoder.push(chunk);
            while let Some(message) = decoder.next()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    fn event(id: &str, event: &str, data: &str) -> Message {
        Message::Event { id: id.into(), event: event.into(), data: data.into() }
    }

    fn comment(text: &str) -> Message {
        Message::Comment(text.into())
    }

    #[test]
    fn decoder_reads_events_comments_and_unknown_lines() {
        let stream =
            b": hello\n\nid: 1\nevent: delta\ndata: {}\n\ndata:a\r\ndata: b\r\n\r\nretry: 5\nnonsense\n\n:\n";
        let expected = vec![comment("hello"), event("1", "delta", "{}"), event("1", "", "a\nb"), comment("")];
        assert_eq!(read(&[stream], 100), Ok(expected));
    }

    #[test]
    fn words_round_trip() {
        for (word, written) in [
            (Word::Here, ""),
            (Word::Wait, "wait"),
            (Word::Stale("for 31 s"), "stale for 31 s"),
            (Word::Go(vec![]), "go"),
            (
                Word::Go(vec!["http://10.0.0.1:8080", "http://10.0.0.2:8080"]),
                "go http://10.0.0.1:8080 http://10.0.0.2:8080",
            ),
        ] {
            assert_eq!((word.to_string().as_str(), Word::of(written)), (written, word));
        }
        assert_eq!(Word::of("gopher"), Word::Here);
    }

    #[test]
    fn decoder_rejects_events_over_the_limit() {
        assert_eq!(read(&[&[b'x'; 64]], 63), Err(Error::TooLong { max: 63 }));
        let lines = b"data: 0123456789\n".repeat(10);
        assert_eq!(read(&[&lines], 50), Err(Error::TooLong { max: 50 }));
    }

    proptest! {
        /// I9: also independent of chunk boundaries.
        #[test]
        fn i9_random_bytes_decode_equally_in_any_chunks(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b':'), Just(b'd'), any::<u8>()], 0..256),
            cuts in proptest::collection::vec(0usize..256, 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let chunks: Vec<_> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(read(&chunks, 1 << 20), read(&[&bytes], 1 << 20));
        }
    }
}
