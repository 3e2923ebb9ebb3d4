//! The process of the client.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use uffd::{Features, Userfaultfd};

use crate::memory::Mapped;
use crate::request::{Answer, Message, Request, Sent};
use crate::socket;

/// The environment variable that makes a test the client.
pub(crate) const VARIABLE: &str = "RAMSNAP_PAGE_CLIENT";

/// Does what the test asks for, in a process that [`Client::spawn`](crate::Client::spawn) has
/// started. Otherwise returns at once.
pub fn run() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut requests = BufReader::new(UnixStream::from(stdin));
    let mut state = State::default();
    loop {
        let mut line = String::new();
        if requests.read_line(&mut line).unwrap() == 0 {
            std::process::exit(0);
        }
        let request = serde_json::from_str(&line).unwrap();
        let (answer, bytes) = match state.answer(request) {
            Ok(done) => done,
            Err(errno) => (Answer::Errno(errno as i32), Vec::new()),
        };
        let line = serde_json::to_string(&answer).unwrap();
        let stream = requests.get_mut();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        stream.write_all(&bytes).unwrap();
    }
}

#[derive(Default)]
struct State {
    memory: Option<Mapped>,
    fault: Option<Userfaultfd>,
    connection: Option<UnixStream>,
}

impl State {
    fn memory(&self) -> &Mapped {
        self.memory.as_ref().expect("memory is mapped first")
    }

    fn answer(&mut self, request: Request) -> Result<(Answer, Vec<u8>), Errno> {
        let done = (Answer::Done, Vec::new());
        Ok(match request {
            Request::Map(memory) => {
                let options = Userfaultfd::options().features(Features::EVENT_REMOVE);
                let fault = options.open().expect("userfaultfd is permitted");
                let mapped = Mapped::new(&memory)?;
                if memory.registered {
                    mapped.register(&fault);
                }
                let addresses = mapped.addresses();
                (self.memory, self.fault) = (Some(mapped), Some(fault));
                (Answer::Addresses(addresses), Vec::new())
            }
            Request::Connect(path) => {
                self.connection = Some(UnixStream::connect(path).unwrap());
                done
            }
            Request::Send(message) => {
                self.send(&message);
                done
            }
            Request::CloseDescriptor => {
                self.fault = None;
                done
            }
            Request::Disconnect => {
                self.connection = None;
                done
            }
            Request::ReadNotice => {
                let mut notice = Vec::new();
                let connection = self.connection.as_mut().expect("it is connected first");
                connection.read_to_end(&mut notice).unwrap();
                (Answer::Bytes(notice.len() as u64), notice)
            }
            Request::Read { offset, len } => {
                let bytes = self.memory().read(offset, len)?;
                (Answer::Bytes(bytes.len() as u64), bytes)
            }
            Request::Write { offset, byte } => {
                self.memory().write(offset, byte);
                done
            }
            Request::Touch { threads, stride } => {
                let sum = self.memory().touch(threads, stride);
                (Answer::Number(sum), Vec::new())
            }
            Request::Measure { first, pages, step } => {
                let times = self.memory().measure(first, pages, step);
                (Answer::Times(times), Vec::new())
            }
            Request::Remove { offset, len } => {
                self.memory().remove(offset, len)?;
                done
            }
            Request::Churn {
                threads,
                seed,
                removed,
            } => {
                let bytes = self.memory().churn(threads, seed, &removed)?;
                (Answer::Bytes(bytes.len() as u64), bytes)
            }
            Request::RunGuest => (Answer::Number(self.memory().run_guest()), Vec::new()),
        })
    }

    fn send(&self, message: &Message) {
        let null = std::fs::File::open("/dev/null").unwrap();
        let connection = self.connection.as_ref().expect("it is connected first");
        for (number, part) in message.parts.iter().enumerate() {
            let with_part = message
                .descriptors
                .iter()
                .filter(|(with, _)| *with == number);
            let descriptors: Vec<_> = with_part
                .map(|(_, descriptor)| match descriptor {
                    Sent::Userfaultfd => self.fault.as_ref().expect("memory is mapped").as_fd(),
                    Sent::Null => null.as_fd(),
                })
                .collect();
            // A server that refuses the message may have closed the connection.
            let _ = socket::send(connection, part, &descriptors);
        }
    }
}
