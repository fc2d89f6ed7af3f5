//! Lower bound for a hub: one thread per core writes valid frames of equal size to all readers. Slow readers receive
//! one merged frame, as from a hub.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use opa_hub_proto::frame::{DELTA_EVENT, Delta, write_event};
use opa_hub_proto::head::DataHead;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::{Digest, Revision, data_digest, modules_digest};
use serde_json::json;
use serde_json::value::RawValue;
use socket2::SockRef;

use crate::fake_apiserver;
use crate::swarm::Start;

/// Distinguishes a driver from readers, which send `GET`.
const HELLO: &[u8] = b"DRIVE\n";
const NEXT: &[u8] = b"GO\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
/// Same as the hub's streams.
const SEND_BUFFER: usize = 16 << 10;

enum Task {
    Join(TcpStream),
    Round(u64),
}

struct Reader {
    tcp: TcpStream,
    sent: u64,
    /// Unsent part of that event.
    unsent: Vec<u8>,
}

pub(crate) struct Driver(TcpStream);

impl Driver {
    pub(crate) fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let mut tcp = TcpStream::connect(address)?;
        tcp.set_nodelay(true)?;
        tcp.write_all(HELLO)?;
        Ok(Self(tcp))
    }

    pub(crate) fn send_next(&mut self) -> anyhow::Result<()> {
        Ok(self.0.write_all(NEXT)?)
    }
}

pub(crate) fn start() -> anyhow::Result<Start> {
    let (dir, digest) = (dir()?, Digest::of(b"0"));
    let content = json!({ "kubernetes": { "pods": { "team-000": {} } } });
    let data = DataHead { dirs: BTreeMap::from([(dir, digest)]), ensure: Vec::new() };
    Ok(Start { revision: revision(0)?, data, position: Position::default(), reads: None, content })
}

pub(crate) fn serve(address: SocketAddr, bytes: usize) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut writers = Vec::new();
    for _ in 0..cores {
        let (out, tasks) = channel();
        writers.push(out);
        std::thread::spawn(move || write(&tasks, bytes).expect("readers keep up and stay connected"));
    }
    for (index, accepted) in listener.incoming().enumerate() {
        let mut tcp = accepted?;
        let mut first = [0; 1];
        if tcp.peek(&mut first)? == 0 {
            continue;
        }
        if &first != b"G" {
            let writers = writers.clone();
            std::thread::spawn(move || drive(tcp, &writers));
            continue;
        }
        _ = tcp.read(&mut [0; 1024])?;
        tcp.set_nodelay(true)?;
        SockRef::from(&tcp).set_send_buffer_size(SEND_BUFFER)?;
        tcp.write_all(RESPONSE)?;
        tcp.set_nonblocking(true)?;
        writers[index % cores].send(Task::Join(tcp))?;
    }
    Ok(())
}

fn drive(tcp: TcpStream, writers: &[Sender<Task>]) -> anyhow::Result<()> {
    // The first line is `HELLO`.
    for (number, line) in (0..).zip(BufReader::new(tcp).lines()) {
        line?;
        if number > 0 {
            writers.iter().try_for_each(|writer| writer.send(Task::Round(number)))?;
        }
    }
    Ok(())
}

fn write(tasks: &Receiver<Task>, bytes: usize) -> anyhow::Result<()> {
    let mut readers: Vec<Reader> = Vec::new();
    for task in tasks {
        match task {
            Task::Join(tcp) => readers.push(Reader { tcp, sent: 0, unsent: Vec::new() }),
            Task::Round(mut newest) => loop {
                for task in tasks.try_iter() {
                    match task {
                        Task::Join(tcp) => readers.push(Reader { tcp, sent: 0, unsent: Vec::new() }),
                        Task::Round(number) => newest = number,
                    }
                }
                if write_all(&mut readers, newest, bytes)? {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            },
        }
    }
    Ok(())
}

/// Returns whether every reader is up to date.
fn write_all(readers: &mut [Reader], number: u64, bytes: usize) -> anyhow::Result<bool> {
    let mut frames: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut is_complete = true;
    for reader in readers {
        if reader.unsent.is_empty() && reader.sent < number {
            let frame = match frames.entry(reader.sent) {
                Entry::Occupied(frame) => frame.into_mut(),
                Entry::Vacant(missing) => missing.insert(frame(reader.sent, number, bytes)?),
            };
            let written = push(&mut reader.tcp, frame)?;
            if written > 0 {
                (reader.sent, reader.unsent) = (number, frame[written..].to_vec());
            }
        } else if !reader.unsent.is_empty() {
            let written = push(&mut reader.tcp, &reader.unsent)?;
            reader.unsent.drain(..written);
        }
        is_complete &= reader.unsent.is_empty() && reader.sent == number;
    }
    Ok(is_complete)
}

fn push(tcp: &mut TcpStream, bytes: &[u8]) -> std::io::Result<usize> {
    match tcp.write(bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        written => written,
    }
}

fn dir() -> anyhow::Result<DirPath> {
    Ok("/kubernetes/pods/team-000".parse()?)
}

fn revision(number: u64) -> anyhow::Result<Revision> {
    let data = data_digest([(&dir()?, Digest::of(number.to_string().as_bytes()))], &[]);
    Ok(Revision { modules: modules_digest([], None), data })
}

fn frame(from: u64, to: u64, bytes: usize) -> anyhow::Result<Vec<u8>> {
    let encode = |filler: usize| -> anyhow::Result<Vec<u8>> {
        let mut value = fake_apiserver::small_pod(0, to, to);
        value["status"]["filler"] = "x".repeat(filler).into();
        let patch = json!([{ "op": "add", "path": "/kubernetes/pods/team-000/web-00000", "value": value }]);
        let delta = Delta {
            from: revision(from)?.data,
            to: revision(to)?.data,
            newest: None,
            position: format!(r#"{{"/kubernetes/pods":{to},"data":1,"policies":1}}"#).parse()?,
            ensure: Vec::new(),
            dirs: BTreeMap::from([(dir()?, Some(Digest::of(to.to_string().as_bytes())))]),
            narrows: false,
            ops: 1,
            patch: &RawValue::from_string(patch.to_string())?,
        };
        let mut out = Vec::new();
        write_event(&mut out, revision(to)?, DELTA_EVENT, &serde_json::to_vec(&delta)?);
        Ok(out)
    };
    encode(bytes.saturating_sub(encode(0)?.len()))
}
