//! Images on their way: the bytes of a packed one, compressed by zstd.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Context;
use nix::sys::stat::fstat;
use page_reader::SecretBuffer;
use zstd::stream::{read::Decoder, write::Encoder};

use crate::failure::Failure;
use crate::session::Session;

/// What stands for stdin or stdout.
pub const STREAM: &str = "-";

/// zstd's own default: about as fast as a network.
const LEVEL: i32 = 3;
/// A window of 8 MiB.
const WINDOW_LOG: u32 = 23;
/// Bytes moved at a time.
const PIECE: usize = 1 << 20;

pub fn is_stream(path: &Path) -> bool {
    path == Path::new(STREAM)
}

/// An image that came by stdin: in a file without a name, which goes when this does.
#[derive(Debug)]
pub struct Received {
    file: File,
}

impl Received {
    /// Decompresses stdin to a file in `dir`.
    pub fn from_stdin(session: &Session, dir: &Path) -> anyhow::Result<Self> {
        let spool = || format!("cannot keep the stream in {dir:?} meanwhile");
        let mut file = tempfile::tempfile_in(dir).with_context(spool)?;
        let mut stream = Decoder::new(io::stdin().lock())?;
        // Memory for what is referred back to: as much as every decoder should take, no more.
        stream.window_log_max(WINDOW_LOG)?;
        let bar = session.bar("receiving");
        let mut buffer = SecretBuffer::new();
        let piece = buffer.sized(PIECE);
        loop {
            let len = match stream.read(piece) {
                Ok(0) => return Ok(Self { file }),
                Ok(len) => len,
                Err(error) if error.raw_os_error().is_some() => {
                    return Err(error).context("cannot read stdin");
                }
                Err(source) => return Err(Failure::StreamBroken { source }.into()),
            };
            file.write_all(&piece[..len]).with_context(spool)?;
            bar.inc(len as u64);
        }
    }

    /// Its only name.
    pub fn path(&self) -> PathBuf {
        format!("/dev/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// Refuses a terminal, before anything is read.
pub fn check_stdout() -> Result<(), Failure> {
    match io::stdout().is_terminal() {
        true => Err(Failure::StreamToTerminal),
        false => Ok(()),
    }
}

/// Refuses an output that is what comes in: `memsnap convert - --zstd -o FILE < FILE`.
pub fn check_is_not_stdin(output: &Path) -> Result<(), Failure> {
    match is_file_of(io::stdin().as_fd(), output) {
        true => Err(Failure::OutputIsInput {
            path: output.to_owned(),
        }),
        false => Ok(()),
    }
}

/// Refuses to send a file to itself: `memsnap convert FILE -o - --zstd >> FILE`.
pub fn check_is_not_stdout(inputs: &[PathBuf]) -> Result<(), Failure> {
    let stdout = io::stdout();
    let same = inputs
        .iter()
        .find(|input| is_file_of(stdout.as_fd(), input));
    match same.cloned() {
        Some(path) => Err(Failure::OutputIsInput { path }),
        None => Ok(()),
    }
}

fn is_file_of(stream: BorrowedFd<'_>, path: &Path) -> bool {
    let (Ok(stream), Ok(file)) = (fstat(stream), path.metadata()) else {
        return false;
    };
    // The types differ from system to system.
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
    let stream = (stream.st_dev as u64, stream.st_ino as u64);
    file.is_file() && stream == (file.dev(), file.ino())
}

/// Compresses `image`, a packed one, to stdout.
pub fn to_stdout(session: &Session, mut image: File) -> anyhow::Result<()> {
    let len = image.metadata()?.len();
    let bar = session.bar("sending");
    bar.set_length(len);
    image.rewind()?;
    let mut send = || {
        let mut stream = Encoder::new(io::stdout().lock(), LEVEL)?;
        stream.include_checksum(true)?;
        stream.set_pledged_src_size(Some(len))?;
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        stream.multithread(threads as u32)?;
        let mut buffer = SecretBuffer::new();
        let piece = buffer.sized(PIECE);
        loop {
            match image.read(piece)? {
                0 => return stream.finish()?.flush(),
                len => {
                    stream.write_all(&piece[..len])?;
                    bar.inc(len as u64);
                }
            }
        }
    };
    send().context("the stream was not sent whole")
}
