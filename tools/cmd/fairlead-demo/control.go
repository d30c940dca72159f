package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// socket is where a running demo takes orders: in its folder, or, where that
// path is too long for a socket, in the folder for temporary files.
func socket(dir string) string {
	path := filepath.Join(dir, "control.sock")
	if len(path) <= 100 {
		return path
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(path))
	return filepath.Join(os.TempDir(), fmt.Sprintf("fairlead-demo-%x.sock", h.Sum64()))
}

// order is a line that somebody sent to a running demo; its answer is one line.
type order struct {
	line   string
	answer chan<- string
}

// listen takes orders until stop.
func listen(dir string, orders chan<- order) (stop func(), err error) {
	path := socket(dir)
	_ = os.Remove(path) // of a demo that was killed; the lock says that there is no other
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	serve := func(c net.Conn) {
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			return
		}
		answer := make(chan string, 1)
		select {
		case orders <- order{strings.TrimSpace(line), answer}:
		case <-quit:
			return
		}
		select {
		case a := <-answer:
			fmt.Fprintln(c, a)
		case <-quit:
			fmt.Fprintln(c, "the demo stops")
		}
	}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(c) })
		}
	})
	return func() {
		close(quit)
		_ = l.Close() // removes the file
		wg.Wait()
	}, nil
}

// ask sends an order to the demo that runs in a folder.
func ask(ctx context.Context, dir, line string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket(dir))
	if err != nil {
		return "", fmt.Errorf("no demo runs in %s: start it with `go tool task demo`", dir)
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	answer = strings.TrimSpace(answer)
	if err != nil && answer == "" {
		return "", errors.New("the demo ended before it answered")
	}
	if why, ok := strings.CutPrefix(answer, failed); ok {
		return "", errors.New(why)
	}
	return answer, nil
}
