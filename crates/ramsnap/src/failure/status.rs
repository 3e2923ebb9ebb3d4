//! The exit status of each error.

use super::Failure;
use crate::exit_status::ExitStatus;
use crate::interrupt;

impl Failure {
    /// Returns the exit status of the tool.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            Self::OutputExists { .. }
            | Self::OutputIsInput { .. }
            | Self::OutputIsStream
            | Self::HasId { .. }
            | Self::StreamIsFile { .. }
            | Self::MergeOntoInput { .. }
            | Self::EventFilter { .. }
            | Self::StreamNotCompressed
            | Self::NoStream
            | Self::StreamLayout
            | Self::StreamFormat
            | Self::StreamToTerminal
            | Self::RawHasNoSeal { .. }
            | Self::DiffInLargerPages { .. }
            | Self::OldPages { .. }
            | Self::RamIsImage { .. }
            | Self::NotARawDiff { .. }
            | Self::ParentIsRaw { .. }
            | Self::TooMuchMetadata { .. }
            | Self::RegionsOverlap
            | Self::RegionInsidePage { .. }
            | Self::NoLayout { .. }
            | Self::OtherRegionsGiven { .. }
            | Self::RawNewState { .. }
            | Self::NoRawNewState
            | Self::NoNewState
            | Self::NoRam
            | Self::UnsupportedImageExtension { .. }
            | Self::ForeignLink { .. }
            | Self::TargetNotPrivate { .. }
            | Self::TargetInUse { .. }
            | Self::TargetSize { .. }
            | Self::SameState { .. }
            | Self::NotOfMachine { .. }
            | Self::OnlyConverted { .. }
            | Self::FormatNotNamed { .. }
            | Self::AddressesUnknown { .. }
            | Self::NoElfMachine
            | Self::NotOfFirecracker { .. }
            | Self::DirectoryExists { .. }
            | Self::NotADirectory { .. }
            | Self::NotRam { .. } => ExitStatus::Usage,
            Self::OtherGuest { .. }
            | Self::OtherRegions { .. }
            | Self::Damaged { .. }
            | Self::NothingToVerify { .. }
            | Self::StreamDamaged { .. }
            | Self::StreamBroken
            | Self::StreamNotPacked
            | Self::StreamTooLong { .. }
            | Self::StreamCut { .. } => ExitStatus::CheckFailed,
            Self::NoStdout
            | Self::NoStdin
            | Self::NoBytes { .. }
            | Self::RamResized { .. }
            | Self::NoRoom { .. }
            | Self::FileLimit { .. }
            | Self::NoMemory { .. }
            | Self::NoMemoryForOutput { .. }
            | Self::NoMemoryToRead { .. }
            | Self::SpoolFull { .. }
            | Self::SpoolOverQuota { .. }
            | Self::TargetBusy { .. }
            | Self::NotReported { .. }
            | Self::SentResized { .. }
            | Self::TargetReplaced { .. }
            | Self::TargetNotWritable { .. }
            | Self::TargetDenied { .. }
            | Self::NoWritesThere { .. } => ExitStatus::Failed,
            #[cfg(target_os = "linux")]
            Self::NothingLarge { .. }
            | Self::UnknownFile { .. }
            | Self::TargetRead { .. }
            | Self::RamBeingRestored { .. }
            | Self::RamMoved { .. }
            | Self::SocketInUse { .. }
            | Self::PassedSocket
            | Self::NoRoomOver { .. }
            | Self::NoHugePages { .. } => ExitStatus::Failed,
            #[cfg(target_os = "linux")]
            Self::NoRegion { .. }
            | Self::NothingMapped { .. }
            | Self::LargerRegion { .. }
            | Self::PartOfRam { .. }
            | Self::RegionTwice { .. }
            | Self::NoSocket
            | Self::NotASocket { .. } => ExitStatus::Usage,
            Self::Interrupted { .. } => interrupt::exit_status(),
        }
    }
}
