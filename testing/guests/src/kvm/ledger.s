# The guest's program: the ledger of ../ledger.rs in machine code. 64-bit, at privilege level 3, no
# stack frames, no interrupts, no relocations. The label of a routine names its result:
# `register: value`.
#
# Registers with a fixed use:
#
#   rbx  front page            r12  index, as an offset into the RAM
#   r8   end of the low RAM    r13  multiplier of `mix`
#   r9   size of the hole      r14  steps done
#   r10  pages of the ledger   r15  the running digest
#   rbp  this step's page      xmm0 the sum of all entries
#
# The host sets rbx and rsp; all other registers are 0 at the start.

# Global: the compiler may put this text and its uses into different objects.
        .globl  ledger_program, ledger_program_end
        .hidden ledger_program, ledger_program_end

ledger_program:
        mov     r8,  [rbx + {GAP_START}]
        mov     r9,  [rbx + {GAP_SIZE}]
        mov     r10, [rbx + {PAGES}]
        mov     r13, {GOLDEN}
        mov     r12, r10                # The index follows the last page.
        shl     r12, 12
        add     r12, [rbx + {PLACE}]

# ---- commands of the host -----------------------------------------------------------------------

commands:
        cmp     qword ptr [rbx + {ORDER}], 0
        jne     audit
work:
        cmp     r14, [rbx + {UNTIL}]
        jae     arrived
        call    step
        jmp     work
arrived:
        mov     eax, {ARRIVED}
        out     {PORT}, al              # The host writes a command, and resumes.
        jmp     commands
audit:
        call    check
        mov     eax, {CHECKED}
        out     {PORT}, al
        jmp     commands

# ---- one step ----------------------------------------------------------------------------------

step:
        inc     r14
        call    pick
        call    locate
        call    prove

        mov     rax, r15                # The digest covers the step, then the page...
        mov     rdx, r14
        call    mix
        mov     rdx, rbp
        call    mix
        mov     r15, rax
        movq    xmm1, rax               # ...and is the entry, which is added to the sum.
        paddq   xmm0, xmm1

        mov     [rsi + {NUMBER}], rbp
        mov     rax, [rsi + {VERSION}]
        inc     rax
        mov     [rsi + {VERSION}], rax
        mov     r11, rax
        xor     edx, edx                # Entries are used in turn.
        mov     ecx, {ENTRIES}
        div     rcx
        mov     [rsi + rdx*8 + {ENTRY}], r15

        call    checksum                # The page is torn until the next three stores are done:
        mov     [rsi + {CHECKSUM}], rax # only its registers can complete a guest paused here.
        mov     [rdi], r11
        mov     [rbx + {STEPS}], r14
        ret

# ---- check of the ledger -----------------------------------------------------------------------

check:
        mov     rax, r15                # First the state of the registers.
        movq    rdx, xmm0
        call    mix
        mov     rdx, r14
        call    mix
        mov     r11, rax
        mov     rbp, {NO_PAGE}
        cmp     r14, [rbx + {STEPS}]
        je      2f
        call    fault
2:      xor     ebp, ebp
3:      call    locate
        call    prove                   # rax is the checksum now.
        mov     rdx, rax
        mov     rax, r11
        call    mix
        mov     rdx, [rdi]
        call    mix
        mov     r11, rax
        inc     rbp
        cmp     rbp, r10
        jb      3b
        mov     [rbx + {DIGEST}], r11
        ret

# ---- choice of the page ------------------------------------------------------------------------

pick:                                   # rbp: the page of this step.
        mov     rax, [rbx + {RANDOM}]
        mov     rcx, rax                # xorshift 13, 7, 17
        shl     rcx, 13
        xor     rax, rcx
        mov     rcx, rax
        shr     rcx, 7
        xor     rax, rcx
        mov     rcx, rax
        shl     rcx, 17
        xor     rax, rcx
        mov     [rbx + {RANDOM}], rax

        mov     rdi, rax
        and     edi, 31
        mov     ecx, {HOT}
        cmp     edi, 20
        jb      pick_below              # One of the hot pages.
        lea     rsi, [rbx + {CURSOR}]
        cmp     edi, 26
        jb      advance                 # The next of the sequence.
        mov     rcx, r10
        cmp     edi, 31
        je      pick_below              # Any page.
        lea     rsi, [rbx + {ROAMER}]
        test    eax, ({JUMP} - 1) << 5
        jnz     advance                 # The next of a run,
        call    pick_below              # or the first of a new one.
        mov     [rsi], rbp
        ret

pick_below:                             # rbp: the random number rax as a page below rcx.
        mul     rcx
        mov     rbp, rdx
        ret

advance:                                # rbp: the page after the one at rsi, or the first.
        xor     ecx, ecx
        mov     rbp, [rsi]
        inc     rbp
        cmp     rbp, r10
        cmove   rbp, rcx
        mov     [rsi], rbp
        ret

# ---- pages -------------------------------------------------------------------------------------

locate:                                 # rsi: address of page rbp; rdi: of its index word.
        mov     rsi, rbp
        shl     rsi, 12
        add     rsi, [rbx + {PLACE}]
        lea     rdi, [r12 + rbp*8]
        xor     eax, eax                # RAM above the low end is after the hole.
        cmp     rsi, r8
        cmovae  rax, r9
        add     rsi, rax
        xor     eax, eax
        cmp     rdi, r8
        cmovae  rax, r9
        add     rdi, rax
        ret

prove:                                  # rax: the checksum of page rsi; counts a fault.
        call    checksum
        cmp     rax, [rsi + {CHECKSUM}]
        jne     fault
        mov     rdx, [rsi + {VERSION}]
        cmp     rdx, [rdi]
        jne     fault
        test    rdx, rdx                # A page never written has no number.
        jz      2f
        cmp     rbp, [rsi + {NUMBER}]
        jne     fault
2:      ret

fault:
        cmp     qword ptr [rbx + {FAULTS}], 0
        jne     2f
        mov     [rbx + {FIRST_FAULT}], rbp
2:      inc     qword ptr [rbx + {FAULTS}]
        ret

checksum:                               # rax: the digest of all words of page rsi but the last.
        xor     eax, eax
        xor     ecx, ecx
2:      rol     rax, 5
        xor     rax, [rsi + rcx]
        imul    rax, r13
        add     ecx, 8
        cmp     ecx, {CHECKSUM}
        jb      2b
        ret

mix:                                    # rax: the digest rax with the word rdx added.
        rol     rax, 5
        xor     rax, rdx
        imul    rax, r13
        ret

ledger_program_end:
