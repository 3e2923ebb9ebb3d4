//! A page server: fills the RAM of VMs of other processes.

mod error;
mod handshake;
mod message;
mod metrics;
mod options;
mod refused;
mod served_vm;

pub use error::ServeError;
pub use message::{MessageError, VmRegions};
pub use metrics::ServerMetrics;
pub use options::PageServerOptions;
pub use refused::{Reaction, RefusedClient, VmProcess};
pub use served_vm::{ServedVm, VmEnd};

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uffd::{Modes, Operations};

use crate::counters::Counters;
use crate::error::LazyError;
use crate::fault_handler::PageFaultHandler;
use crate::filling::Filling;
use crate::page_bits::PageBits;
use crate::pages::{Pages, Parts};
use crate::peer::{self, OnFailure, Peer};
use crate::peer_process::PeerProcess;
use crate::prefetcher::Prefetcher;
use crate::ram_source::RamSource;
use crate::region::host_page;
use crate::status::Status;
use crate::target::Target;
use crate::userfaultfd::Userfaultfd;
use handshake::Received;

/// A server that fills the RAM of VMs of other processes from one source, by Firecracker's
/// page-fault protocol.
///
/// A VMM connects to a Unix stream socket, and sends the [regions](VmRegions) of its RAM and the
/// userfaultfd that they are registered with. The server fills a page when the VMM or its guest
/// touches it, and the other pages in the background. It maps no memory of the VMM, and accesses it
/// by the userfaultfd only.
///
/// # Permissions
/// The server needs no permission for userfaultfd: it receives a descriptor that the VMM has
/// opened. The VMM needs one for faults that the kernel takes on behalf of a vCPU:
/// `/dev/userfaultfd` (Linux 6.1), `CAP_SYS_PTRACE`, or the sysctl `vm.unprivileged_userfaultfd`.
/// [`OnFailure::Kill`] needs the permission to kill the VMM: the same user, or `CAP_KILL`. This is
/// checked when the VMM connects.
///
/// # No wrong bytes
/// A page is never filled with zeros in place of data. Pass a
/// [`VerifiedChain`](memory_image::VerifiedChain) as source, so that damaged bytes are not served
/// either. [`OnDamage`](crate::OnDamage) decides what happens to pages that cannot be read, and
/// [`OnFailure`] what happens to the VMM if serving fails. If the process of the server is killed
/// itself, a VMM that keeps its own copy of the descriptor, as Firecracker does, waits forever at
/// its next fault; one that has closed it finds zeros.
///
/// # Discarded memory
/// Pages that the VMM discards (`MADV_DONTNEED` of a balloon) are zeros afterwards, if it has
/// requested the feature `UFFD_FEATURE_EVENT_REMOVE`, as Firecracker does. A VMM that discards
/// pages without it gets the bytes of the image again.
///
/// # Examples
/// ```no_run
/// use std::os::unix::net::UnixListener;
///
/// use lazy_restore::{PageServer, VmEnd};
/// use memory_image::{Chain, VerifiedChain};
///
/// let chain = Chain::open_sealed(&["full.mem", "d1.mem"])?;
/// let server = PageServer::options().source(VerifiedChain::new(chain))?;
/// let socket = UnixListener::bind("/run/vm/pages.sock")?;
/// let (connection, _) = socket.accept()?; // after `PUT /snapshot/load`
/// match server.serve(connection)?.wait() {
///     VmEnd::Filled => println!("all RAM is filled"),
///     end => println!("{end:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PageServer {
    source: Arc<dyn RamSource>,
    options: PageServerOptions,
    counters: Arc<Counters>,
    vms: Arc<Vms>,
}

/// Numbers of VMs by their state.
#[derive(Debug, Default)]
struct Vms {
    served: AtomicU64,
    filled: AtomicU64,
    exited: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
}

/// A message, a descriptor and a process that are to be served.
struct Client {
    connection: UnixStream,
    process: PeerProcess,
    received: Received,
}

impl PageServer {
    /// Returns the default options.
    pub fn options() -> PageServerOptions {
        PageServerOptions::default()
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.source.ram_size()
    }

    /// Returns what the server has done, in numbers.
    #[must_use]
    pub fn metrics(&self) -> ServerMetrics {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        ServerMetrics {
            vms: load(&self.vms.served),
            filled_vms: load(&self.vms.filled),
            exited_vms: load(&self.vms.exited),
            failed_vms: load(&self.vms.failed),
            refused_clients: load(&self.vms.refused),
            ..ServerMetrics::of(&self.counters)
        }
    }

    /// Receives the message of a VMM that has connected, and starts to fill its RAM. Waits for the
    /// message at most for [`handshake_limit`](PageServerOptions::handshake_limit). Several threads
    /// may call this at the same time.
    ///
    /// # Errors
    /// Returns a [`RefusedClient`]. If the client has sent a descriptor, so that it may wait for
    /// its pages, [`on_failure`](PageServerOptions::on_failure) is applied before this returns: it
    /// is killed, or is notified, and this waits until it has exited.
    pub fn serve(&self, connection: UnixStream) -> Result<ServedVm, RefusedClient> {
        let served = self.identify_and_serve(connection);
        served.inspect_err(|_| _ = self.vms.refused.fetch_add(1, Ordering::Relaxed))
    }

    fn identify_and_serve(&self, connection: UnixStream) -> Result<ServedVm, RefusedClient> {
        let process = PeerProcess::of(&connection).map_err(|source| RefusedClient {
            error: ServeError::Process(source),
            process: None,
            reaction: None,
        })?;
        if self.options.on_failure == OnFailure::Kill {
            let may_kill = process.check_may_kill();
            may_kill.map_err(|source| RefusedClient {
                error: ServeError::Process(source),
                process: Some(Box::new(process.named())),
                reaction: None,
            })?;
        }
        let mut client = Client {
            connection,
            process,
            received: Received::default(),
        };
        let served = self.receive_and_start(&mut client);
        served.map_err(|error| self.refuse(client, error))
    }

    /// Ends a client that may wait for its pages, or notifies it.
    fn refuse(&self, client: Client, error: ServeError) -> RefusedClient {
        let Client {
            process,
            connection,
            received,
        } = client;
        // Named before it is killed.
        let named = process.named();
        let mut reaction = None;
        // A client without a userfaultfd waits for nothing.
        if let Some(_kept_open) = received.descriptor.filter(may_be_userfaultfd) {
            let text = error.to_string();
            let done = peer::end(&process, &connection, self.options.on_failure, &text);
            if done == Reaction::Notified {
                process.wait_for_exit();
            }
            reaction = Some(done);
        }
        RefusedClient {
            error,
            process: Some(Box::new(named)),
            reaction,
        }
    }

    fn receive_and_start(&self, client: &mut Client) -> Result<ServedVm, ServeError> {
        let limit = self.options.handshake_limit;
        client.received.receive(&client.connection, limit)?;
        let message = client.received.message().unwrap_or_default();
        let regions = VmRegions::parse(message, self.source.ram_size())?;
        let descriptor = client.received.descriptor.as_ref();
        let descriptor = descriptor.ok_or(ServeError::NoDescriptor)?;
        // The client's one is kept, so that it is not closed if this fails.
        let fault = descriptor.try_clone().and_then(uffd::Userfaultfd::from_fd);
        let fault = fault.map_err(ServeError::Descriptor)?;
        let (can_poison, is_huge) = register(&regions, &fault)?;
        let fault = Userfaultfd::of_peer(fault, regions.page_size(), is_huge);
        let failed = |source| LazyError::Reserve {
            size: self.source.ram_size(),
            source,
        };
        let settled = PageBits::none(self.source.ram_size(), regions.page_size());
        let settled = settled.map_err(failed)?;
        let status = Status::new(self.options.prefetches()).map_err(failed)?;
        let connection = client
            .connection
            .try_clone()
            .map_err(ServeError::Connection)?;
        let process = client.process.try_clone().map_err(ServeError::Process)?;
        let peer = Peer {
            regions: regions.regions,
            process,
            connection,
            on_failure: self.options.on_failure,
            on_damage: self.options.on_damage,
        };
        let pages = Pages::new(Parts {
            source: Box::new(Arc::clone(&self.source)),
            target: Target::Peer(peer),
            fault,
            can_poison,
            settled,
            counters: Arc::clone(&self.counters),
            status,
        });
        let pages = Arc::new(pages.map_err(failed)?);
        let PageServerOptions {
            fault_around,
            record,
            ..
        } = self.options;
        let handler = PageFaultHandler::new(Arc::clone(&pages), fault_around, record);
        let prefetcher = Prefetcher::new(Arc::clone(&pages), self.options.working_set.clone());
        let filling = Filling::new(pages, handler, prefetcher);
        let started = filling.start(self.options.handlers, self.options.prefetches());
        started.inspect_err(|_| filling.stop())?;
        let process = client.process.named();
        Ok(ServedVm::new(filling, process, Arc::clone(&self.vms)))
    }
}

fn may_be_userfaultfd(descriptor: &OwnedFd) -> bool {
    let cloned = descriptor.try_clone();
    cloned.map_or(true, |it| uffd::Userfaultfd::from_fd(it).is_ok())
}

impl fmt::Debug for PageServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The source need not be `Debug`.
        f.debug_struct("PageServer")
            .field("options", &self.options)
            .field("vms", &self.vms)
            .finish_non_exhaustive()
    }
}

/// Checks that all regions are registered with the userfaultfd, by registering them again, which
/// changes nothing. Returns whether their pages can be poisoned, and whether they are of hugetlbfs.
fn register(listed: &VmRegions, fault: &uffd::Userfaultfd) -> Result<(bool, bool), ServeError> {
    let (mut can_poison, is_huge) = (true, listed.page_size() != host_page());
    for region in listed.regions.iter() {
        let refused = |what: &str| ServeError::Region {
            address: region.address,
            len: region.len,
            what: what.to_owned(),
        };
        let operations = sys::register(fault, region.addresses());
        let operations = operations.map_err(|error| refused(&error.source.to_string()))?;
        if !operations.contains(Operations::COPY) {
            return Err(refused("its pages cannot be copied to"));
        }
        // The kernel has no zero page for hugetlbfs.
        if operations.contains(Operations::ZEROPAGE) == is_huge {
            return Err(refused(
                "its pages do not have the size that the message states",
            ));
        }
        can_poison &= operations.contains(Operations::POISON);
    }
    Ok((can_poison, is_huge))
}

mod sys {
    #![allow(unsafe_code)]

    use std::ops::Range;

    use uffd::{RegisterError, Userfaultfd};

    use super::{Modes, Operations};

    pub(super) fn register(
        fault: &Userfaultfd,
        addresses: Range<u64>,
    ) -> Result<Operations, RegisterError> {
        // SAFETY: the memory is that of the process that has opened the descriptor, and has sent it
        // for its missing pages to be filled. The kernel refuses addresses that are not mapped
        // there. Memory of this process is not registered with a descriptor that it has received.
        unsafe { fault.register(addresses, Modes::MISSING) }
    }
}
