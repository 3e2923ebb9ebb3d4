//! Snapshot KVM guests: guest RAM as a page source, the dirty log, vCPU state.
