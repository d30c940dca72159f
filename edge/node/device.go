package node

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// Device is a device of the host that pods may ask for.
type Device struct {
	// Name makes the extended resource fairlead.dev/<Name>.
	Name string
	// Path is where the device is, such as /dev/serial/by-id/usb-FTDI_A50285BI-if00-port0.
	Path string
}

var deviceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$`)

// ParseDevice reads --device: NAME=/dev/serial/by-id/….
func ParseDevice(s string) (Device, error) {
	name, path, ok := strings.Cut(s, "=")
	if !ok || !deviceName.MatchString(name) {
		return Device{}, fmt.Errorf("device %q: want NAME=PATH with a name of small letters, digits and dashes, such as meter=/dev/serial/by-id/usb-FTDI_A50285BI-if00-port0", s)
	}
	if p := filepath.Clean(path); p != path || !strings.HasPrefix(p, "/dev/") {
		return Device{}, fmt.Errorf("device %s: want a path below /dev, got %q", name, path)
	}
	return Device{name, path}, nil
}

// Resource is the extended resource.
func (d Device) Resource() corev1.ResourceName {
	return corev1.ResourceName("fairlead.dev/" + d.Name)
}

// Host is the device node, with symlinks resolved; empty while the device is not there.
func (d Device) Host() string {
	p, err := filepath.EvalSymlinks(d.Path)
	if err != nil {
		return ""
	}
	if s, err := os.Stat(p); err != nil || s.Mode()&os.ModeDevice == 0 {
		return ""
	}
	return p
}

// settle is how long udev may still be at work after a device node came or went.
const settle = 200 * time.Millisecond

// WatchDevices calls changed, from one goroutine, once it watches, and whenever one
// of the devices came, went or became another node, until ctx ends. It costs
// nothing while nothing happens in the folders of the devices.
func WatchDevices(ctx context.Context, devices []Device, changed func()) error {
	if len(devices) == 0 {
		<-ctx.Done()
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer func() { _ = f.Close() }()
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })()

	// Watches are for the folders that there are; the folder that the device will be
	// in may come with it.
	watch := func() error {
		for _, d := range devices {
			for _, p := range []string{d.Path, d.Host()} {
				for p != "" {
					p = filepath.Dir(p)
					_, err := unix.InotifyAddWatch(fd, p, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVE|unix.IN_ATTRIB|unix.IN_DELETE_SELF|unix.IN_ONLYDIR)
					if err == nil {
						break
					}
					if err != unix.ENOENT && err != unix.ENOTDIR {
						return fmt.Errorf("watch %s: %w", p, err)
					}
				}
			}
		}
		return nil
	}
	look := func() (out []string) {
		for _, d := range devices {
			out = append(out, d.Host())
		}
		return out
	}
	var known []string
	buf := make([]byte, 4096)
	for {
		if err := watch(); err != nil {
			return err
		}
		// What came before the watch was there has no event.
		if now := look(); !slices.Equal(now, known) {
			known = now
			changed()
			continue
		}
		if _, err := f.Read(buf); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if err == io.EOF {
				return fmt.Errorf("watch devices: %w", io.ErrUnexpectedEOF)
			}
			return fmt.Errorf("watch devices: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
	}
}
