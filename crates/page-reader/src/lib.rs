//! Where the bytes of a guest's RAM come from: the PageReader trait, its sources, and the layout of guest-physical memory.

mod bytes;
mod file;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod host_memory;
mod layered;
mod layout;
mod mapped;
#[cfg(target_os = "linux")]
mod process;
mod range;
mod reader;

pub use file::FileReader;
#[cfg(feature = "vm-memory")]
pub use guest_memory::GuestMemoryReader;
pub use host_memory::HostMemory;
pub use layered::{Layered, LayeredError};
pub use layout::{LayoutError, OutsideRam, RamLayout, RamRange};
pub use mapped::{MappedMemory, MappedMemoryError};
#[cfg(target_os = "linux")]
pub use process::{ProcessMemory, ProcessMemoryError};
pub use reader::PageReader;
