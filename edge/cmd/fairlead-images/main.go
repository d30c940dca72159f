// Command fairlead-images moves images between files and containerd. It is what
// `fairlead-edge images` runs, and stands beside it: containerd's client in the
// agent would cost it 4.5 MB of memory (see edge/pods/archive).
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/fairlead-io/fairlead/edge/pods/archive"
	"github.com/fairlead-io/fairlead/edge/pods/archive/folder"
)

const usage = `fairlead-edge images moves images between files and this node's containerd, for
sites without a registry.

Usage:
  fairlead-edge images import FILE… [--name REF] [--pin]
  fairlead-edge images import --folder DIR
  fairlead-edge images export REF… --file FILE
  fairlead-edge images list

FILE is an archive of docker save, podman save, skopeo or ctr images export, also
with gzip or zstd; - is the standard input or output.

Flags:
`

// command is a command line.
type command struct {
	socket, name, folder, file, output string
	pin                                bool
}

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fairlead-edge images:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	var f command
	fs := pflag.NewFlagSet("fairlead-edge images", pflag.ContinueOnError)
	fs.StringVar(&f.socket, "socket", "unix:///run/containerd/containerd.sock", "containerd's socket")
	fs.StringVarP(&f.file, "file", "o", "", "export: the archive to write")
	fs.StringVar(&f.name, "name", "", "import: the image's name, for an archive with one image")
	fs.BoolVar(&f.pin, "pin", false, "import: never remove the images to make room (containerd 1.7 or newer)")
	fs.StringVar(&f.folder, "folder", "", "import: the archives of this folder that have not been imported yet")
	fs.StringVar(&f.output, "output", "text", "text or json; an import prints a JSON object for each archive")
	fs.Usage = func() { fmt.Fprint(out, usage, fs.FlagUsages()) }
	if err := fs.Parse(args); err != nil {
		if err == pflag.ErrHelp { //nolint:errorlint // pflag returns it bare
			return nil
		}
		return err
	}
	if f.output != "text" && f.output != "json" {
		return fmt.Errorf("--output %q: want text or json", f.output)
	}
	verb, rest := fs.Arg(0), fs.Args()
	if len(rest) > 0 {
		rest = rest[1:]
	}
	var do func(context.Context, *archive.Client) error
	switch verb {
	case "import":
		if (len(rest) == 0) == (f.folder == "") {
			return errors.New("images import: want archives, or a folder of them with --folder")
		}
		if f.name != "" && len(rest) != 1 {
			return errors.New("--name wants one archive")
		}
		do = func(ctx context.Context, c *archive.Client) error { return f.importAll(ctx, c, rest, in, out) }
	case "export":
		if len(rest) == 0 || f.file == "" {
			return errors.New("images export: want images, and the archive to write with --file")
		}
		do = func(ctx context.Context, c *archive.Client) error {
			if f.file == "-" {
				return c.Export(ctx, out, rest...)
			}
			return c.ExportFile(ctx, f.file, rest...)
		}
	case "list":
		if len(rest) > 0 {
			return errors.New("images list takes no arguments")
		}
		do = func(ctx context.Context, c *archive.Client) error { return f.list(ctx, c, out) }
	default:
		fs.Usage()
		return fmt.Errorf("want images import, export or list, got %q", verb)
	}
	c, err := archive.Dial(f.socket)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return errors.Join(do(ctx, c), c.Close())
}

func (f *command) importAll(ctx context.Context, c *archive.Client, files []string, in io.Reader, out io.Writer) error {
	var p progress
	if terminal(os.Stderr) {
		p.w = os.Stderr
	}
	var failed []error
	report := func(r folder.Result) {
		p.clear()
		if r.Error != "" {
			failed = append(failed, errors.New(r.Error))
		}
		switch {
		case f.output == "json":
			_ = json.NewEncoder(out).Encode(r) // as with the texts, nobody may read it
		case r.Error == "":
			fmt.Fprintf(out, "%s: imported %s\n", r.File, strings.Join(r.Images, ", "))
		}
	}
	if f.folder != "" {
		err := c.Folder(ctx, f.folder, p.show, report)
		p.clear()
		if f.output == "json" {
			return err // who reads that has seen the rest
		}
		return errors.Join(append(failed, err)...)
	}
	for _, file := range files {
		var imgs []archive.Image
		var err error
		o := archive.Options{Name: f.name, Pin: f.pin}
		if file == "-" {
			imgs, err = c.Import(ctx, in, o)
		} else {
			imgs, err = c.ImportFile(ctx, file, o, func(read, size int64) { p.show(filepath.Base(file), read, size) })
		}
		r := folder.Result{File: file}
		for _, i := range imgs {
			r.Images = append(r.Images, i.Name)
		}
		if err != nil {
			r.Error = err.Error()
		}
		report(r)
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(failed...)
}

func (f *command) list(ctx context.Context, c *archive.Client, out io.Writer) error {
	imgs, err := c.List(ctx)
	if err != nil {
		return err
	}
	if f.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(imgs)
	}
	buffered := bufio.NewWriter(out)
	w := tabwriter.NewWriter(buffered, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tDIGEST\tSIZE\tFROM")
	for _, i := range imgs {
		from := i.Archive
		if i.Pinned {
			from = strings.TrimSpace(from + " (pinned)")
		}
		fmt.Fprintf(w, "%s\t%.19s\t%s\t%s\n", i.Name, i.Digest, bytesText(i.Size), from)
	}
	return errors.Join(w.Flush(), buffered.Flush())
}

// bytesText is a size for people, in steps of 1000 as other image tools count.
func bytesText(n int64) string {
	f := float64(n)
	for _, unit := range []string{"B", "kB", "MB"} {
		if f < 1000 {
			return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + unit
		}
		f /= 1000
	}
	return fmt.Sprintf("%.1f GB", f)
}

// progress is a line that is written over and over.
type progress struct {
	w    io.Writer // nil for none
	last time.Time
	file string
}

func (p *progress) show(file string, read, size int64) {
	if p.w == nil || file == p.file && time.Since(p.last) < 100*time.Millisecond {
		return
	}
	p.last, p.file = time.Now(), file
	percent := int64(100)
	if size > 0 {
		percent = min(100, 100*read/size)
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s: %d %% of %s", file, percent, bytesText(size))
}

func (p *progress) clear() {
	if p.w != nil && p.file != "" {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.file = ""
	}
}

func terminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
