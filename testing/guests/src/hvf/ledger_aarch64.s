// The guest's program: the ledger of ../ledger.rs in machine code, like ../kvm/ledger.s for x86-64.
// AArch64, at exception level 1, no stack, no interrupts, no relocations. The label of a routine
// names its result: `register: value`.
//
// Registers with a fixed use:
//
//   x19  front page                        x24  multiplier of `mix`
//   x20  end of the low RAM, as an offset  x25  steps done
//   x21  size of the hole                  x26  the running digest
//   x22  pages of the ledger               x27  start of the RAM
//   x23  index, as an offset               x28  this step's page
//   d0   the sum of all entries
//
// The host sets x19; all other registers are 0 at the start. The return address of an outer routine
// is in x17, that of a middle one in x16.
//
// Labels begin with L: with Apple's assembler any other label would start a new atom, which the
// linker might move.

        ldr     x20, [x19, #{GAP_START}]
        ldr     x21, [x19, #{GAP_SIZE}]
        ldr     x22, [x19, #{PAGES}]
        ldr     x24, Lgolden
        ldr     x27, Lfront
        sub     x27, x19, x27
        mov     x23, #{LEDGER}          // The index follows the last page.
        add     x23, x23, x22, lsl #12

// ---- commands of the host ----------------------------------------------------------------------

Lcommands:
        ldr     x0, [x19, #{ORDER}]
        cbnz    x0, Laudit
Lwork:
        ldr     x0, [x19, #{UNTIL}]
        cmp     x25, x0
        b.hs    Larrived
        bl      Lstep
        b       Lwork
Larrived:
        hvc     #{ARRIVED}              // The host writes a command, and resumes.
        b       Lcommands
Laudit:
        bl      Lcheck
        hvc     #{CHECKED}
        b       Lcommands

// ---- one step ---------------------------------------------------------------------------------

Lstep:
        mov     x17, x30
        add     x25, x25, #1
        bl      Lpick
        bl      Llocate
        bl      Lprove

        mov     x0, x26                 // The digest covers the step, then the page...
        mov     x1, x25
        bl      Lmix
        mov     x1, x28
        bl      Lmix
        mov     x26, x0
        fmov    d1, x0                  // ...and is the entry, which is added to the sum.
        add     d0, d0, d1

        str     x28, [x9, #{NUMBER}]
        ldr     x11, [x9, #{VERSION}]
        add     x11, x11, #1
        str     x11, [x9, #{VERSION}]
        mov     x1, #{ENTRIES}          // Entries are used in turn.
        udiv    x2, x11, x1
        msub    x2, x2, x1, x11
        add     x2, x9, x2, lsl #3
        str     x26, [x2, #{ENTRY}]

        bl      Lchecksum               // The page is torn until the next three stores are done:
        str     x0, [x9, #{CHECKSUM}]   // only its registers can complete a guest paused here.
        str     x11, [x10]
        str     x25, [x19, #{STEPS}]
        ret     x17

// ---- check of the ledger ----------------------------------------------------------------------

Lcheck:
        mov     x17, x30
        mov     x0, x26                 // First the state of the registers.
        fmov    x1, d0
        bl      Lmix
        mov     x1, x25
        bl      Lmix
        mov     x11, x0
        ldr     x28, Lno_page
        ldr     x1, [x19, #{STEPS}]
        cmp     x25, x1
        b.eq    2f
        bl      Lfault
2:      mov     x28, xzr
3:      bl      Llocate
        bl      Lprove                  // x0 is the checksum now.
        mov     x1, x0
        mov     x0, x11
        bl      Lmix
        ldr     x1, [x10]
        bl      Lmix
        mov     x11, x0
        add     x28, x28, #1
        cmp     x28, x22
        b.lo    3b
        str     x11, [x19, #{DIGEST}]
        ret     x17

// ---- choice of the page -----------------------------------------------------------------------

Lpick:                                  // x28: the page of this step.
        ldr     x0, [x19, #{RANDOM}]
        eor     x0, x0, x0, lsl #13     // xorshift 13, 7, 17
        eor     x0, x0, x0, lsr #7
        eor     x0, x0, x0, lsl #17
        str     x0, [x19, #{RANDOM}]

        and     x2, x0, #31
        mov     x1, #{HOT}
        cmp     x2, #20
        b.lo    Lpick_below             // One of the hot pages.
        add     x3, x19, #{CURSOR}
        cmp     x2, #26
        b.lo    Ladvance                // The next of the sequence.
        mov     x1, x22
        cmp     x2, #31
        b.eq    Lpick_below             // Any page.
        add     x3, x19, #{ROAMER}
        tst     x0, #(({JUMP} - 1) << 5)
        b.ne    Ladvance                // The next of a run,
        umulh   x28, x0, x1             // or the first of a new one.
        str     x28, [x3]
        ret

Lpick_below:                            // x28: the random number x0 as a page below x1.
        umulh   x28, x0, x1
        ret

Ladvance:                               // x28: the page after the one at x3, or the first.
        ldr     x28, [x3]
        add     x28, x28, #1
        cmp     x28, x22
        csel    x28, xzr, x28, eq
        str     x28, [x3]
        ret

// ---- pages ------------------------------------------------------------------------------------

Llocate:                                // x9: address of page x28; x10: of its index word.
        lsl     x9, x28, #12
        add     x9, x9, #{LEDGER}
        add     x10, x23, x28, lsl #3
        cmp     x9, x20                 // RAM above the low end is after the hole.
        csel    x1, x21, xzr, hs
        cmp     x10, x20
        csel    x2, x21, xzr, hs
        add     x9, x9, x1
        add     x10, x10, x2
        add     x9, x9, x27
        add     x10, x10, x27
        ret

Lprove:                                 // x0: the checksum of page x9; counts a fault.
        mov     x16, x30
        bl      Lchecksum
        ldr     x1, [x9, #{CHECKSUM}]
        cmp     x0, x1
        b.ne    2f
        ldr     x1, [x9, #{VERSION}]
        ldr     x2, [x10]
        cmp     x1, x2
        b.ne    2f
        cbz     x1, 3f                  // A page never written has no number.
        ldr     x2, [x9, #{NUMBER}]
        cmp     x2, x28
        b.eq    3f
2:      bl      Lfault
3:      ret     x16

Lfault:
        ldr     x2, [x19, #{FAULTS}]
        cbnz    x2, 2f
        str     x28, [x19, #{FIRST_FAULT}]
2:      add     x2, x2, #1
        str     x2, [x19, #{FAULTS}]
        ret

Lchecksum:                              // x0: the digest of all words of page x9 but the last.
        mov     x0, xzr
        mov     x1, x9
        add     x2, x9, #{CHECKSUM}
2:      ldr     x3, [x1], #8
        ror     x0, x0, #59             // Rotated left by 5.
        eor     x0, x0, x3
        mul     x0, x0, x24
        cmp     x1, x2
        b.lo    2b
        ret

Lmix:                                   // x0: the digest x0 with the word x1 added.
        ror     x0, x0, #59
        eor     x0, x0, x1
        mul     x0, x0, x24
        ret

        .p2align 3
Lgolden:
        .quad   {GOLDEN}
Lfront:
        .quad   {FRONT}
Lno_page:
        .quad   {NO_PAGE}
