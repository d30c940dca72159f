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

// letPagesGo unmaps the program's code and constants. What was ever written to is
// left alone, such as what the loader relocated: it could not come back.
func letPagesGo() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var errs []error
	var from, to uintptr // a mapping of the program; 0 is none
	for s := bufio.NewScanner(f); s.Scan(); {
		words := strings.Fields(s.Text())
		switch {
		case len(words) >= 5 && strings.Contains(words[0], "-") && len(words[1]) == 4:
			from, to = 0, 0
			if len(words) == 6 && words[5] == exe && words[1][1] != 'w' {
				if _, err := fmt.Sscanf(words[0], "%x-%x", &from, &to); err != nil {
					return err
				}
			}
		case words[0] == "Anonymous:" && from != 0 && words[1] == "0":
			if _, _, e := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); e != 0 {
				errs = append(errs, e)
			}
		}
	}
	return errors.Join(errs...)
}
