//! A TCP proxy that knows as much of ONC RPC as it takes to lose the answer to one call.
//!
//! Each record starts with a word that has its length and, in the top bit, whether it is the last
//! of its message (RFC 5531, section 11); a message starts with the number that its answer repeats.
//! Linux sends each message as one record.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What to do, once, and to which call.
pub(crate) enum Trap {
    /// Lets the server answer the first call that has all of these byte strings in it, and loses
    /// the answer with the connection.
    LoseAnswer(Vec<Vec<u8>>),
    /// Calls this before passing on the first call that has all of these byte strings in it.
    Before(Vec<Vec<u8>>, Box<dyn FnOnce() + Send>),
    /// Calls this once so many bytes have come from the client.
    After(u64, Box<dyn FnOnce() + Send>),
}

#[derive(Default)]
struct State {
    trap: Option<Trap>,
    /// The number of the message whose answer is to be lost.
    losing: Option<[u8; 4]>,
    sprung: bool,
}

/// Listens on a port of its own and passes everything on to the server, until a trap is set.
pub(crate) struct Proxy {
    pub port: u16,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    pub(crate) fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        // Ends with the process: the guest's mounts live as long.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                thread::spawn(move || drop(serve(client, server, &state)));
            }
        });
        Ok(Self { port, state })
    }

    pub(crate) fn set(&self, trap: Trap) {
        *self.lock() = State {
            trap: Some(trap),
            ..State::default()
        };
    }

    /// Whether the trap went off; there is none any more.
    pub(crate) fn sprung(&self) -> bool {
        std::mem::take(&mut *self.lock()).sprung
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn serve(client: TcpStream, server: SocketAddr, state: &Arc<Mutex<State>>) -> io::Result<()> {
    // A server that is being restarted refuses connections for a moment.
    let server = match TcpStream::connect_timeout(&server, Duration::from_secs(5)) {
        Ok(server) => server,
        Err(error) => {
            let _ = client.shutdown(Shutdown::Both);
            return Err(error);
        }
    };
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let answers = {
        let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
        let state = Arc::clone(state);
        thread::spawn(move || {
            let _ = pass(&mut from, &mut to, |message| {
                !is_to_be_lost(&state, message)
            });
            close(&from, &to);
        })
    };
    let mut received = 0;
    let passed = pass(&mut &client, &mut &server, |message| {
        received += message.len() as u64;
        before_call(state, message, received);
        true
    });
    close(&client, &server);
    let _ = answers.join();
    passed
}

fn close(a: &TcpStream, b: &TcpStream) {
    let _ = a.shutdown(Shutdown::Both);
    let _ = b.shutdown(Shutdown::Both);
}

/// Passes record by record until an end, an error, or a record that `allow` doesn't let through.
fn pass(
    from: &mut impl Read,
    to: &mut impl Write,
    mut allow: impl FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    loop {
        let mut head = [0; 4];
        from.read_exact(&mut head)?;
        let len = u32::from_be_bytes(head) & 0x7fff_ffff;
        let mut message = vec![0; len as usize];
        from.read_exact(&mut message)?;
        if !allow(&message) {
            return Ok(());
        }
        to.write_all(&[&head, &message[..]].concat())?;
    }
}

fn before_call(state: &Mutex<State>, message: &[u8], received: u64) {
    let mut state = state
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let springs = match &state.trap {
        None => false,
        Some(Trap::LoseAnswer(marks) | Trap::Before(marks, _)) => {
            marks.iter().all(|mark| contains(message, mark))
        }
        Some(Trap::After(bytes, _)) => received >= *bytes,
    };
    if !springs {
        return;
    }
    state.sprung = true;
    match state.trap.take() {
        Some(Trap::LoseAnswer(_)) => state.losing = message.first_chunk().copied(),
        Some(Trap::Before(_, act) | Trap::After(_, act)) => {
            // Unlocked: the server's end of this connection is about to close, which other threads
            // notice.
            drop(state);
            act();
        }
        None => {}
    }
}

fn is_to_be_lost(state: &Mutex<State>, message: &[u8]) -> bool {
    let mut state = state
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if state.losing.is_some() && state.losing.as_ref() == message.first_chunk() {
        state.losing = None;
        return true;
    }
    false
}

fn contains(message: &[u8], mark: &[u8]) -> bool {
    message.windows(mark.len()).any(|window| window == mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(message: &[u8]) -> Vec<u8> {
        let head = (message.len() as u32 | 0x8000_0000).to_be_bytes();
        [&head, message].concat()
    }

    /// A server that answers each record with the same record.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || pass(&mut &stream, &mut &stream, |_| true));
            }
        });
        address
    }

    #[test]
    fn only_the_answer_to_the_marked_call_is_lost() {
        let proxy = Proxy::start(echo()).expect("a proxy");
        let call = |message: &[u8]| -> io::Result<Vec<u8>> {
            let mut stream = TcpStream::connect(("127.0.0.1", proxy.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            stream.write_all(&record(message))?;
            let mut answer = vec![0; 4 + message.len()];
            stream.read_exact(&mut answer)?;
            Ok(answer)
        };
        proxy.set(Trap::LoseAnswer(vec![b"stage".into(), b"vm.mem".into()]));
        let other = b"0001 lookup vm.mem";
        assert_eq!(call(other).expect("an answer"), record(other));
        let rename = b"0002 rename stage to vm.mem";
        let lost = call(rename).expect_err("the answer is lost");
        assert_eq!(lost.kind(), io::ErrorKind::UnexpectedEof);
        assert!(proxy.sprung());
        assert_eq!(
            call(rename).expect("answered when asked again"),
            record(rename)
        );
    }
}
