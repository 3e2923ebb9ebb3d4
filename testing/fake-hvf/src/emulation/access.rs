//! Accesses of the guest to memory, and the aborts that they cause.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;

use super::decode::{self, DATA_ABORT, INSTRUCTION_ABORT};
use crate::exit::{Exit, ExitException};
use crate::interrupts::GuestException;
use crate::memory::{self, EXEC, Refusal, WRITE};
use crate::page_tables::Fault;
use crate::state::{State, Stop};

/// Bits of a syndrome.
const STAGE_1_WALK: u64 = 1 << 7;
const IS_WRITE: u64 = 1 << 6;
/// The bit of an exception class of an abort that is taken without a change of level.
const SAME_LEVEL: u64 = 1;

/// The smallest page. HPFAR_EL2 has no more bits of an address.
const IN_PAGE: u64 = (4 << 10) - 1;

impl State {
    /// Checks both stages of translation for an access of the instruction at `self.pc`.
    ///
    /// An error is what happens in place of the access.
    pub(super) fn access(
        &mut self,
        addresses: RangeInclusive<u64>,
        permission: u64,
    ) -> Result<(), Stop> {
        let version = self.translations.version();
        let memory = memory::read();
        for address in [*addresses.start(), *addresses.end()] {
            let walked = self.translations.physical(&memory, address, permission);
            let physical = walked.map_err(|fault| self.fault(fault, address, permission))?;
            memory.check(physical, permission).map_err(|refusal| {
                let more = 0;
                stage_2_abort(self.pc, refusal, permission, more, [address, physical])
            })?;
        }
        // After `storing` is set: a vCPU that invalidates translations waits for the store, or its
        // request is seen here.
        if self.translations.version() != version
            || self.shared.stale_translations.load(Ordering::SeqCst)
        {
            return Err(Stop::Attention);
        }
        Ok(())
    }

    /// Returns what a walk without a result causes.
    fn fault(&self, fault: Fault, address: u64, permission: u64) -> Stop {
        match fault {
            Fault::Guest(status) => {
                let from_same_level = self.translations.level() == 1;
                let class = class(permission) | if from_same_level { SAME_LEVEL } else { 0 };
                Stop::Exception(GuestException {
                    syndrome: decode::syndrome(class, write(permission) | status),
                    return_address: self.pc,
                    fault_address: Some(address),
                })
            }
            Fault::Walk {
                refusal,
                descriptor,
            } => {
                let reported = descriptor & !IN_PAGE | address & IN_PAGE;
                let more = STAGE_1_WALK;
                stage_2_abort(self.pc, refusal, permission, more, [address, reported])
            }
        }
    }
}

fn class(permission: u64) -> u64 {
    match permission {
        EXEC => INSTRUCTION_ABORT,
        _ => DATA_ABORT,
    }
}

fn write(permission: u64) -> u64 {
    if permission == WRITE { IS_WRITE } else { 0 }
}

/// Returns the exit of an access that stage 2 refuses. The addresses are the virtual and the
/// guest-physical one.
fn stage_2_abort(
    pc: u64,
    refusal: Refusal,
    permission: u64,
    more: u64,
    [virtual_address, physical_address]: [u64; 2],
) -> Stop {
    let status = match refusal {
        Refusal::Translation => 0x07,
        Refusal::Permission => 0x0f,
    };
    let exception = ExitException {
        syndrome: decode::syndrome(class(permission), write(permission) | more | status),
        virtual_address,
        physical_address,
    };
    Stop::Exit(Exit::Exception(exception), pc)
}
