//! Snapshot guests of Apple's Hypervisor framework: guest RAM as a page source, dirty tracking by stage-2 write protection, vCPU state.

mod syndrome;
mod tracker;
