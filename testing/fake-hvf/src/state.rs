//! The state of a vCPU beside the registers in its engine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::calls::{Code, Outcome};
use crate::exit::Exit;
use crate::interrupts::{GuestException, Lines, Vector, enter_level_1};
use crate::page_tables::Regime;
use crate::registers::{level, stack_pointer, unexpected};
use crate::system_registers::{
    CNTFRQ_EL0, CNTP_CTL_EL0, CNTP_CVAL_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTV_TVAL_EL0,
    CNTVCT_EL0, CPACR_EL1, ESR_EL1, FAR_EL1, ID_AA64MMFR1_EL1, IN_ENGINE, MPIDR_EL1,
    PHYSICAL_TIMER, SCTLR_EL1, SystemRegisters, TCR_EL1, TTBR0_EL1, TTBR1_EL1,
};
use crate::timer::VirtualTimer;
use crate::translations::Translations;
use crate::unicorn::{Engine, UnicornError, register};
use crate::vcpus::Shared;
use crate::{host, machine, memory, timer};

/// The state of a vCPU beside the registers in the engine.
pub(crate) struct State {
    pub shared: Arc<Shared>,
    /// The address of the instruction that is executed.
    pub pc: u64,
    /// The page that it is in, where the guest may execute.
    pub page: Option<u64>,
    /// The number of instructions until the timer is read again.
    pub until_timer: u32,
    pub stop: Option<Stop>,
    pub trap_breakpoints: bool,
    pub lines: Lines,
    pub system: SystemRegisters,
    pub timer: VirtualTimer,
    pub translations: Translations,
}

/// Why a callback stopped the engine.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The vCPU exits. The program counter is then this.
    Exit(Exit, u64),
    /// Something is to be looked at before the instruction at `pc`.
    Attention,
    /// An interrupt is taken before the instruction at `pc`.
    Interrupt { fiq: bool },
    /// The guest takes an exception to its own level 1.
    Exception(GuestException),
    /// Translated code is forgotten before the instruction at `next`.
    ForgetCode { next: u64 },
    /// The registers of translation have changed before the instruction at `next`.
    OtherRegime { next: u64 },
    /// All vCPUs forget their translations of addresses before the instruction at `next`.
    ForgetTranslations { next: u64 },
    /// The guest does what this crate does not emulate.
    Unsupported(String),
}

impl State {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            pc: 0,
            page: None,
            until_timer: 0,
            stop: None,
            trap_breakpoints: false,
            lines: Lines::default(),
            system: SystemRegisters::default(),
            timer: VirtualTimer::default(),
            translations: Translations::default(),
        }
    }

    /// Returns the lines that are pending: those that the host has set, and the controller's.
    pub(crate) fn lines(&self) -> Lines {
        let irq = self.shared.interrupt.load(Ordering::Relaxed);
        self.lines.with_irq(irq)
    }

    /// Waits for an interrupt. Returns false if something else is to be looked at first.
    pub(crate) fn wait(&self) -> bool {
        loop {
            if self.lines().any() {
                return true;
            }
            if self.shared.attention.load(Ordering::SeqCst) || self.timer_is_due() {
                return false;
            }
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Takes an interrupt before the instruction at `pc`.
    ///
    /// The line stays pending: the framework clears it when the vCPU exits, and the guest has
    /// interrupts masked until it returns from its handler. Here it is taken once.
    pub(crate) fn take_interrupt(
        &mut self,
        engine: &Engine,
        fiq: bool,
        pc: u64,
    ) -> Result<(), UnicornError> {
        let vector = if fiq { Vector::Fiq } else { Vector::Irq };
        match fiq {
            true => self.lines.fiq = false,
            false => self.lines.irq = false,
        }
        enter_level_1(engine, &self.system, vector, pc)
    }

    /// Takes an exception of the guest's own.
    pub(crate) fn take_exception(
        &mut self,
        engine: &Engine,
        exception: &GuestException,
    ) -> Result<(), UnicornError> {
        self.system.set(ESR_EL1, exception.syndrome);
        if let Some(address) = exception.fault_address {
            self.system.set(FAR_EL1, address);
        }
        let vector = Vector::Synchronous;
        enter_level_1(engine, &self.system, vector, exception.return_address)
    }

    /// Returns the registers that decide how the guest's addresses are translated.
    fn regime(&self) -> Regime {
        Regime {
            sctlr: self.system.get(SCTLR_EL1),
            tcr: self.system.get(TCR_EL1),
            ttbr: [TTBR0_EL1, TTBR1_EL1].map(|register| self.system.get(register)),
            features: self.system.get(ID_AA64MMFR1_EL1),
        }
    }

    /// Makes the translations those of the registers and of the level. Forgets stale ones.
    pub(crate) fn follow_translation(&mut self, pstate: u64) {
        if self.shared.stale_translations.swap(false, Ordering::SeqCst) {
            self.translations.forget();
        }
        let regime = self.regime();
        self.translations.follow(regime, level(pstate));
    }

    /// Returns the instruction at an address that was executed.
    pub(crate) fn instruction(&self, pc: u64) -> u32 {
        let physical = self.translations.known(pc);
        let instruction = physical.and_then(|at| memory::read().instruction(at));
        instruction.unwrap_or_default()
    }

    /// Returns the guest's virtual counter.
    fn counter(&self) -> u64 {
        self.timer.counter()
    }

    /// Returns CNTV_CTL_EL0 with its status.
    fn timer_control(&self) -> u64 {
        let compared = self.system.get(CNTV_CVAL_EL0);
        self.timer.control(self.system.get(CNTV_CTL_EL0), compared)
    }

    /// Returns CNTP_CTL_EL0 with its status.
    fn physical_timer_control(&self) -> u64 {
        let compared = self.system.get(CNTP_CVAL_EL0);
        timer::physical_control(self.system.get(CNTP_CTL_EL0), compared)
    }

    pub(crate) fn timer_is_due(&self) -> bool {
        let compared = self.system.get(CNTV_CVAL_EL0);
        self.timer.is_due(self.system.get(CNTV_CTL_EL0), compared)
    }

    /// Returns whether the timer causes an exit, and masks it then.
    pub(crate) fn timer_fires(&mut self) -> bool {
        let fires = self.timer_is_due();
        self.timer.masked |= fires;
        fires
    }

    /// Returns what the guest reads from a register of this crate.
    pub(crate) fn guest_reads(&self, register: u16) -> Option<u64> {
        match register {
            CNTVCT_EL0 => Some(self.counter()),
            CNTFRQ_EL0 => Some(host::FREQUENCY),
            CNTV_TVAL_EL0 => Some(self.system.get(CNTV_CVAL_EL0).wrapping_sub(self.counter())),
            CNTV_CTL_EL0 => Some(self.timer_control()),
            _ if self.system.has(register) => Some(self.system.get(register)),
            _ => None,
        }
    }

    /// Writes a register of this crate for the guest. Returns whether the instruction is done.
    pub(crate) fn guest_writes(&mut self, register: u16, value: u64) -> bool {
        match register {
            CNTV_TVAL_EL0 => {
                // A signed difference of 32 bits.
                let difference = i64::from(value as u32 as i32).cast_unsigned();
                let at = self.counter().wrapping_add(difference);
                self.system.set(CNTV_CVAL_EL0, at);
            }
            _ if self.system.has(register) => self.system.set(register, value),
            _ => return false,
        }
        // Unicorn traps vector instructions by its own CPACR_EL1.
        register != CPACR_EL1
    }

    /// Returns whether the framework accesses the register of this vCPU.
    fn is_accessible(&self, register: u16) -> bool {
        if PHYSICAL_TIMER.contains(&register) {
            return machine::has_gic();
        }
        self.system.is_known(register)
    }

    pub(crate) fn read(&self, engine: &Engine, register: u16) -> Result<u64, Code> {
        match register {
            CNTV_CTL_EL0 => Ok(self.timer_control()),
            CNTP_CTL_EL0 if self.is_accessible(register) => Ok(self.physical_timer_control()),
            _ if IN_ENGINE.contains(&register) => {
                read_from_engine(engine, register).map_err(unexpected)
            }
            _ if self.is_accessible(register) => Ok(self.system.get(register)),
            _ => Err(Code::BAD_ARGUMENT),
        }
    }

    pub(crate) fn write(&mut self, engine: &Engine, register: u16, value: u64) -> Outcome {
        if IN_ENGINE.contains(&register) {
            return write_to_engine(engine, register, value).map_err(unexpected);
        }
        if !self.is_accessible(register) {
            return Err(Code::BAD_ARGUMENT);
        }
        if host::kept().contains(&register) {
            return Ok(());
        }
        let value = match register {
            MPIDR_EL1 => {
                // Bit 31 is always 1.
                let value = value | 1 << 31;
                self.shared.affinity.store(value, Ordering::SeqCst);
                value
            }
            CPACR_EL1 => {
                engine.write_system(register, value).map_err(unexpected)?;
                value
            }
            _ => value,
        };
        self.system.set(register, value);
        Ok(())
    }
}

/// Returns whether the register is the stack pointer in use. Unicorn has its value in SP only.
fn is_in_use(engine: &Engine, register: u16) -> Result<bool, UnicornError> {
    Ok(stack_pointer(engine.read(register::PSTATE)?) == register)
}

fn read_from_engine(engine: &Engine, register: u16) -> Result<u64, UnicornError> {
    match is_in_use(engine, register)? {
        true => engine.read(register::SP),
        false => engine.read_system(register),
    }
}

fn write_to_engine(engine: &Engine, register: u16, value: u64) -> Result<(), UnicornError> {
    match is_in_use(engine, register)? {
        true => engine.write(register::SP, value),
        false => engine.write_system(register, value),
    }
}
