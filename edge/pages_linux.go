package edge

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What a program maps of its own file counts as its memory, and most of what it
// touches it needs once, to start. So the pages are let go after the start, and from
// time to time: those in use come back from the page cache at the next touch.
const (
	firstLetGo = 30 * time.Second
	letGoEvery = 5 * time.Minute
)

// letGo lets pages of the program go until ctx ends.
func letGo(ctx context.Context, log *slog.Logger) {
	t := time.NewTimer(firstLetGo)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := letPagesGo(); err != nil {
			log.Debug("the program's pages stay", "error", err)
			return
		}
		t.Reset(letGoEvery)
	}
}

// letPagesGo unmaps the program's code and constants, which nobody writes to.
func letPagesGo() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var errs []error
	for s := bufio.NewScanner(f); s.Scan(); {
		words := strings.Fields(s.Text())
		if len(words) < 6 || words[5] != exe || strings.Contains(words[1], "w") {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(words[0], "%x-%x", &from, &to); err != nil {
			return err
		}
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); e != 0 {
			errs = append(errs, e)
		}
	}
	return errors.Join(errs...)
}
