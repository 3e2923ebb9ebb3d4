//! QEMU's monitor, over a socket whose other end is QEMU's standard input: lines of JSON both ways.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use harness::interrupt::Interrupt;
use serde::Deserialize;
use serde_json::{Value, json};

/// The longest that QEMU may take to answer: it does so at once, but for loading its own program.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often a wait looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(100);

/// One conversation with a QEMU.
pub(super) struct Qmp {
    socket: BufReader<UnixStream>,
    /// What was read of a line whose end has not come yet.
    line: Vec<u8>,
    commands: u64,
    interrupt: Interrupt,
    pub version: String,
}

/// What QEMU sends; the fields that are there show which kind it is.
#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    id: Option<u64>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Greeting {
    version: Version,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Version {
    qemu: Numbers,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Numbers {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Takes QEMU's greeting and enters the mode in which it takes commands.
    pub(super) fn greet(socket: UnixStream, interrupt: &Interrupt) -> anyhow::Result<Self> {
        socket.set_read_timeout(Some(LOOK))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            socket: BufReader::new(socket),
            line: Vec::new(),
            commands: 0,
            interrupt: interrupt.clone(),
            version: String::new(),
        };
        let greeting = qmp.message(PATIENCE)?.greeting;
        let Version { qemu } = greeting.context("QEMU sent no greeting")?.version;
        qmp.version = format!("{}.{}.{}", qemu.major, qemu.minor, qemu.micro);
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives a command, and returns what QEMU returns; events that come before are passed over.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.commands += 1;
        let id = self.commands;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        self.socket
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("QEMU refused the command {command}"))?;
        loop {
            let message = self
                .message(PATIENCE)
                .with_context(|| format!("no reply to {command}"))?;
            match message {
                Message {
                    error: Some(refusal),
                    ..
                } => bail!("QEMU refuses {command}: {}", refusal.desc),
                Message {
                    id: Some(of),
                    returned: Some(value),
                    ..
                } if of == id => return Ok(value),
                _ => {}
            }
        }
    }

    /// The next message.
    fn message(&mut self, within: Duration) -> anyhow::Result<Message> {
        let deadline = Instant::now() + within;
        loop {
            self.interrupt.check()?;
            // An error leaves in `line` what had come.
            match self.socket.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.line);
                    let text = || String::from_utf8_lossy(&line);
                    return serde_json::from_slice(&line)
                        .with_context(|| format!("not a message of QMP: {}", text().trim()));
                }
                Ok(_) => bail!("QEMU has closed its monitor"),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock) => {
                    if Instant::now() >= deadline {
                        bail!("QEMU's monitor was silent for {} s", within.as_secs());
                    }
                }
                Err(error) => return Err(error).context("can't read from QEMU's monitor"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;

    /// A conversation with a peer that sends `lines` and ignores what it receives.
    fn with(lines: &[&str]) -> (anyhow::Result<Qmp>, UnixStream) {
        let (here, mut there) = UnixStream::pair().expect("a socket");
        for line in lines {
            writeln!(there, "{line}").expect("room in the socket");
        }
        (Qmp::greet(here, &Interrupt::default()), there)
    }

    #[test]
    fn the_greeting_contains_the_version() {
        let (qmp, _there) = with(&[GREETING, r#"{"return": {}, "id": 1}"#]);
        assert_eq!(qmp.expect("a greeting").version, "7.2.22");
    }

    #[test]
    fn an_event_before_the_answer_is_no_answer() {
        let (qmp, _there) = with(&[
            GREETING,
            r#"{"return": {}, "id": 1}"#,
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
            r#"{"return": {"status": "completed"}, "id": 2}"#,
        ]);
        let answer = qmp
            .expect("a greeting")
            .execute("query-migrate", json!({}))
            .expect("an answer");
        assert_eq!(answer, json!({"status": "completed"}));
    }

    #[test]
    fn an_answer_in_two_pieces_is_one_answer() {
        let (qmp, mut there) = with(&[GREETING, r#"{"return": {}, "id": 1}"#]);
        let mut qmp = qmp.expect("a greeting");
        there.write_all(br#"{"return": {"run"#).expect("room");
        let rest = thread::spawn(move || {
            // Longer than the reading side waits at a time.
            thread::sleep(2 * LOOK);
            there
                .write_all(b"ning\": true}, \"id\": 2}\n")
                .expect("room");
            there
        });
        let answer = qmp.execute("query-status", json!({})).expect("an answer");
        assert_eq!(answer, json!({"running": true}));
        rest.join().expect("no panic");
    }

    #[test]
    fn a_refusal_is_an_error_that_names_the_command_and_why() {
        let (qmp, _there) = with(&[
            GREETING,
            r#"{"return": {}, "id": 1}"#,
            r#"{"id": 2, "error": {"class": "GenericError", "desc": "no such thing"}}"#,
        ]);
        let error = qmp
            .expect("a greeting")
            .execute("cont", json!({}))
            .expect_err("a refusal");
        assert_eq!(error.to_string(), "QEMU refuses cont: no such thing");
    }

    #[test]
    fn a_qemu_that_is_gone_is_an_error() {
        let (here, there) = UnixStream::pair().expect("a socket");
        drop(there);
        let error = Qmp::greet(here, &Interrupt::default()).err();
        let error = error.expect("a closed socket").to_string();
        assert!(error.contains("closed its monitor"), "{error}");
    }

    #[test]
    fn a_silent_qemu_is_given_up() {
        let (qmp, _there) = with(&[GREETING, r#"{"return": {}, "id": 1}"#]);
        let error = qmp
            .expect("a greeting")
            .message(Duration::ZERO)
            .expect_err("nothing was said");
        assert!(error.to_string().contains("was silent"), "{error}");
    }
}
