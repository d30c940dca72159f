package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// screen prints lines and, on a terminal, keeps one status line below them.
type screen struct {
	out      *os.File
	terminal bool

	mu struct {
		sync.Mutex
		status string
	}
}

func newScreen(out *os.File, terminal bool) *screen { return &screen{out: out, terminal: terminal} }

const wipe = "\r\x1b[K"

// print writes lines above the status line.
func (s *screen) print(lines ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.terminal && s.mu.status != "" {
		fmt.Fprint(s.out, wipe)
	}
	for _, l := range lines {
		fmt.Fprintln(s.out, l)
	}
	s.drawLocked()
}

// status rewrites the status line; elsewhere it is a line of its own.
func (s *screen) status(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.terminal {
		fmt.Fprintln(s.out, line)
		return
	}
	s.mu.status = line
	s.drawLocked()
}

// done ends the status line.
func (s *screen) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.terminal && s.mu.status != "" {
		fmt.Fprint(s.out, wipe)
		s.mu.status = ""
	}
}

func (s *screen) drawLocked() {
	if !s.terminal || s.mu.status == "" {
		return
	}
	line := s.mu.status
	if w, _, err := term.GetSize(int(s.out.Fd())); err == nil && w > 1 && utf8.RuneCountInString(line) >= w {
		line = string([]rune(line)[:w-1])
	}
	fmt.Fprint(s.out, wipe, line)
}

// step shows what is being done and for how long; the function it gives ends
// the line. What ends within a second says nothing but its name and time.
func (s *screen) step(what string) func() {
	began := time.Now()
	if !s.terminal {
		fmt.Fprintf(s.out, "%s … ", what)
		return func() { fmt.Fprintf(s.out, "%.1f s\n", time.Since(began).Seconds()) }
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			s.status(fmt.Sprintf("%s … %.1f s", what, time.Since(began).Seconds()))
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	return func() {
		close(stop)
		<-stopped
		s.done()
		s.print(fmt.Sprintf("%s … %.1f s", what, time.Since(began).Seconds()))
	}
}

// keys gives the keys that are pressed on the terminal, without Enter and
// without echo; Ctrl-C stays a signal. nil where there is no terminal of ours.
func keys(in *os.File) (pressed <-chan byte, restore func()) {
	fd := int(in.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, func() {}
	}
	// In the background a read, or a change of the terminal, would stop us.
	if pg, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err != nil || pg != unix.Getpgrp() {
		return nil, func() {}
	}
	raw := *old
	raw.Lflag &^= unix.ICANON | unix.ECHO
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, func() {}
	}
	ch := make(chan byte)
	go func() { // ends with the process: a read of a terminal cannot be interrupted
		b := make([]byte, 1)
		for {
			if _, err := in.Read(b); err != nil {
				return
			}
			ch <- b[0]
		}
	}()
	return ch, func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }
}

// quote makes one word of a shell's command line.
func quote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-:=+,@%", r))
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
