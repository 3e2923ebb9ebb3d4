//! Descriptors that were opened elsewhere, for the memory of this process.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::stat::{fstat, major};

use crate::error::{AdoptError, OpenError};
use crate::flags::{Features, Modes};
use crate::open::negotiate;
use crate::options::UserfaultfdOptions;
use crate::probe::Probe;
use crate::sys;
use crate::userfaultfd::{Userfaultfd, is_device};

/// The major number of `/dev/userfaultfd` and other small drivers.
const MISC: u64 = 10;

/// The bit that the kernel adds to the features once they were requested.
const REQUESTED: Features = Features::from_bits_retain(1 << 31);

impl UserfaultfdOptions {
    /// Uses a descriptor for the memory of this process, which may not open one itself:
    ///
    /// - an open `/dev/userfaultfd`, which a privileged process has passed (`SCM_RIGHTS`), by which
    ///   this process opens a userfaultfd of its own;
    /// - a userfaultfd that this process, or one that shares its memory, has opened, for example
    ///   before it gave up its privileges. Its features may have been requested already.
    ///
    /// A userfaultfd receives the faults of the process that *opened* it, so one that another
    /// process has opened is refused. Nothing else may use the userfaultfd, or read its events,
    /// from now on. It is made non-blocking.
    ///
    /// A userfaultfd is examined with a page of memory that is registered for the time of the call,
    /// and by `/proc/self` if its features were requested already.
    ///
    /// # Errors
    /// Returns an [`AdoptError`].
    pub fn adopt(&self, descriptor: OwnedFd) -> Result<Userfaultfd, AdoptError> {
        let file = fstat(&descriptor).map_err(unchecked)?;
        if is_device(&file) {
            if major(file.st_rdev) != MISC {
                return Err(AdoptError::NotUserfaultfd);
            }
            return self.open_by_passed_device(&descriptor);
        }
        let mut fault = Userfaultfd::from_fd(descriptor).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => AdoptError::NotUserfaultfd,
            _ => AdoptError::Unchecked(error),
        })?;
        let new = self.request_features(&mut fault)?;
        let probe = Probe::new().map_err(AdoptError::Unchecked)?;
        if !probe.is_in_memory_of(&fault) {
            return Err(AdoptError::OtherProcess);
        }
        if !new {
            check_unused(&fault)?;
        }
        probe.check_faults(&fault, self.user_mode_only)?;
        Ok(fault)
    }

    fn open_by_passed_device(&self, device: &OwnedFd) -> Result<Userfaultfd, AdoptError> {
        let open = || sys::open_by_device(device, self.flags());
        let opened = self.open_by(|| open().map_err(|errno| OpenError::Open(errno.into())));
        // Other drivers refuse the request, which has no valid flags for them.
        let refused = |source: &io::Error| {
            let errno = source.raw_os_error().map(Errno::from_raw);
            matches!(errno, Some(Errno::ENOTTY | Errno::EINVAL))
        };
        opened.map_err(|error| match error {
            OpenError::Open(source) if refused(&source) => AdoptError::NotUserfaultfd,
            error => AdoptError::Open(error),
        })
    }

    /// Requests the features if none were requested yet, and returns whether that is so. Otherwise
    /// checks those that were.
    fn request_features(&self, fault: &mut Userfaultfd) -> Result<bool, AdoptError> {
        for features in [self.required | self.optional, self.required] {
            match negotiate(fault.descriptor(), features) {
                Ok(_) => {
                    fault.set_features(features);
                    return Ok(true);
                }
                // Requested already, or not available.
                Err(Errno::EINVAL) => {}
                Err(Errno::EPERM) if features.contains(Features::EVENT_FORK) => {}
                Err(errno) => {
                    let source = errno.into();
                    return Err(OpenError::Negotiate { features, source }.into());
                }
            }
        }
        let requested = requested_features(fault).map_err(AdoptError::Unchecked)?;
        let missing = self.required - requested;
        if !missing.is_empty() || !requested.contains(REQUESTED) {
            return Err(AdoptError::Features { missing });
        }
        fault.set_features(requested - REQUESTED);
        Ok(false)
    }
}

/// Returns the features that were requested, as the kernel lists them.
fn requested_features(fault: &Userfaultfd) -> io::Result<Features> {
    let list = read_info(fault)?;
    // API:\t<version>:<features>:<operations>
    let features = field(&list, "API:").and_then(|api| api.split(':').nth(1));
    let features = features.and_then(|bits| u64::from_str_radix(bits, 16).ok());
    features
        .map(Features::from_bits_retain)
        .ok_or_else(|| io::Error::other("/proc/self/fdinfo lists no features"))
}

fn read_info(fault: &Userfaultfd) -> io::Result<String> {
    let mut list = String::new();
    let info = File::open(format!("/proc/self/fdinfo/{}", fault.as_raw_fd()));
    info?.read_to_string(&mut list)?;
    Ok(list)
}

fn field<'l>(list: &'l str, name: &str) -> Option<&'l str> {
    let mut lines = list.lines();
    lines
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

/// Fails if an access waits for the userfaultfd, or if memory of this process is registered with
/// it.
fn check_unused(fault: &Userfaultfd) -> Result<(), AdoptError> {
    let info = read_info(fault).map_err(AdoptError::Unchecked)?;
    if field(&info, "total:") != Some("0") {
        return Err(AdoptError::InUse("accesses wait for it"));
    }
    for (range, modes) in registered().map_err(AdoptError::Unchecked)? {
        // To register a range again changes nothing. That of another userfaultfd is refused.
        if fault.is_registered(range, modes) {
            return Err(AdoptError::InUse("memory is registered with it"));
        }
    }
    Ok(())
}

/// Returns the mappings that are registered with any userfaultfd.
fn registered() -> io::Result<Vec<(Range<u64>, Modes)>> {
    let list = BufReader::new(File::open("/proc/self/smaps")?);
    let (mut mappings, mut range) = (Vec::new(), 0..0);
    for line in list.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let modes = modes(flags);
            if !modes.is_empty() {
                mappings.push((range.clone(), modes));
            }
        } else if let Some(addresses) = addresses(&line) {
            range = addresses;
        }
    }
    Ok(mappings)
}

/// Returns the addresses if a line begins with them.
fn addresses(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

/// Returns the modes in the flags of a mapping.
fn modes(flags: &str) -> Modes {
    let mode = |flag| match flag {
        "um" => Modes::MISSING,
        "uw" => Modes::WRITE_PROTECT,
        "ui" => Modes::MINOR,
        _ => Modes::empty(),
    };
    flags.split_whitespace().map(mode).collect()
}

fn unchecked(errno: Errno) -> AdoptError {
    AdoptError::Unchecked(errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel_are_parsed() {
        let mapping = "7f31a000-7f31b000 rw-p 00000000 00:00 0 ";
        assert_eq!(addresses(mapping), Some(0x7f31_a000..0x7f31_b000));
        assert_eq!(addresses("Size:                 64 kB"), None);
        assert_eq!(
            modes(" rd wr mr um uw "),
            Modes::MISSING | Modes::WRITE_PROTECT
        );
        assert_eq!(modes(" rd wr mr"), Modes::empty());
        let info = "pending:\t0\ntotal:\t2\nAPI:\taa:8000004c:80000000000001ff\n";
        assert_eq!(field(info, "total:"), Some("2"));
        assert_eq!(field(info, "none:"), None);
    }
}
