//! The socket limit: one thread that writes the same bytes to every connection, and does nothing else. What a hub takes
//! beyond it is the hub's own.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

/// What is answered to each reader.
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
/// What asks for a round.
pub(crate) const GO: &[u8] = b"GO";

/// Serves for ever: whoever sends [`GO`] has an event of so many bytes written to everybody else, and is told when
/// that was done.
pub(crate) fn serve(address: SocketAddr, bytes: usize) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)?;
    let mut readers: Vec<TcpStream> = Vec::new();
    let mut round = 0_u64;
    loop {
        let (mut tcp, _) = listener.accept()?;
        let mut request = [0; 1024];
        let length = tcp.read(&mut request)?;
        if length == 0 {
            continue;
        }
        if !request[..length].starts_with(GO) {
            tcp.set_nodelay(true)?;
            tcp.write_all(RESPONSE)?;
            tcp.set_nonblocking(true)?;
            readers.push(tcp);
            continue;
        }
        round += 1;
        let frame = frame(round, bytes);
        for reader in &mut readers {
            match reader.write(&frame) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                written => anyhow::ensure!(written? == frame.len(), "a reader does not keep up"),
            }
        }
        tcp.write_all(GO)?;
    }
}

fn frame(round: u64, bytes: usize) -> Vec<u8> {
    let around = format!("event: delta\nid: {round}\ndata: \n\n");
    let filler = "x".repeat(bytes.saturating_sub(around.len()));
    format!("event: delta\nid: {round}\ndata: {filler}\n\n").into_bytes()
}
