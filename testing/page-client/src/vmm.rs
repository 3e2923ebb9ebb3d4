//! A VMM in this process, for programs whose clients act on their own.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{Features, Userfaultfd};

use crate::memory::Mapped;
use crate::request::{Memory, listed};
use crate::socket;

/// Memory of this process that a page server fills. It stays mapped until the process ends.
///
/// The server must be another process.
pub struct Vmm {
    memory: Mapped,
    sizes: Vec<u64>,
    fault: Userfaultfd,
    connection: Option<UnixStream>,
}

impl fmt::Debug for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmm")
            .field("sizes", &self.sizes)
            .field("fault", &self.fault)
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Vmm {
    /// Maps ordinary memory, and registers it with a userfaultfd.
    ///
    /// # Errors
    /// Fails if the memory cannot be mapped.
    pub fn new(memory: &Memory) -> Result<Self, Errno> {
        let options = Userfaultfd::options().features(Features::EVENT_REMOVE);
        let fault = options.open().expect("userfaultfd is permitted");
        let mapped = Mapped::new(memory)?;
        mapped.register(&fault);
        Ok(Self {
            memory: mapped,
            sizes: memory.regions.clone(),
            fault,
            connection: None,
        })
    }

    /// Connects to a server, and sends the regions and the userfaultfd, as Firecracker does.
    ///
    /// # Errors
    /// Fails if no server listens, or if it has closed the connection.
    pub fn connect(&mut self, socket: &Path) -> io::Result<()> {
        let connection = UnixStream::connect(socket)?;
        let regions = self.memory.addresses().into_iter().zip(self.sizes.clone());
        let message = listed(&regions.collect::<Vec<_>>(), 4096);
        let connection = self.connection.insert(connection);
        socket::send(connection, message.as_bytes(), &[self.fault.as_fd()])?;
        Ok(())
    }

    /// Reads memory by system calls.
    ///
    /// # Errors
    /// Returns `EFAULT` for memory that is poisoned.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        self.memory.read(offset, len)
    }

    /// Discards memory, as a balloon does.
    ///
    /// # Errors
    /// Returns the error of `madvise`.
    pub fn remove(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.memory.remove(offset, len)
    }

    /// Returns whether the server has sent something, or has closed the connection.
    #[must_use]
    pub fn is_notified(&self) -> bool {
        let Some(connection) = &self.connection else {
            return true;
        };
        let mut ready = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Returns what the server has sent, once it has closed the connection.
    pub fn notice(&mut self) -> String {
        let mut notice = Vec::new();
        if let Some(connection) = &mut self.connection {
            // A connection that was reset has ended too.
            let _ = connection.read_to_end(&mut notice);
        }
        String::from_utf8_lossy(&notice).into_owned()
    }
}
