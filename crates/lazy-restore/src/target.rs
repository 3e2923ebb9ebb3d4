//! The process whose memory is filled.

use crate::error::LazyError;
use crate::memory::Memory;
use crate::peer::Peer;
use crate::regions::Regions;

/// The process whose memory is filled.
#[derive(Debug)]
pub(crate) enum Target {
    /// This process.
    Own(Memory),
    /// Another process, which has sent its userfaultfd. Its memory is not mapped here.
    Peer(Peer),
}

impl Target {
    pub(crate) fn regions(&self) -> &Regions {
        match self {
            Self::Own(memory) => memory.regions(),
            Self::Peer(peer) => &peer.regions,
        }
    }

    /// Returns whether an error for some page must end the filling of all pages.
    pub(crate) fn must_end(&self, error: &LazyError) -> bool {
        match self {
            Self::Own(_) => false,
            Self::Peer(peer) => peer.ends_on_damage() || !error.is_of_source(),
        }
    }
}
