package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fairlead-io/fairlead/broker/store"
)

// storeFlags name the store that a command is about.
type storeFlags struct{ data, store string }

// dir is the folder of the store itself.
func (f *storeFlags) dir() (string, error) {
	switch {
	case f.data != "" && f.store != "":
		return "", errors.New("--data and --store are both given: --data DIR means the store DIR/store")
	case f.store != "":
		return filepath.Clean(f.store), nil
	case f.data != "":
		return filepath.Join(f.data, "store"), nil
	}
	return "", errors.New("no store: give --data, the data folder of the agent, or --store, the folder of a store")
}

func (a *app) storeCommand() *cobra.Command {
	var f storeFlags
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Back up, restore, check, show and repair a broker's store",
		Long: `Back up, restore, check, show and repair the store of a broker, on its own host.

Only backup works beside a running agent. The others want the agent stopped, or
the store of a backup: a running agent is never disturbed.

  --data DIR      the data folder of an agent; its store is DIR/store
  --store FOLDER  the folder of a store: one that was set aside, or the cloud
                  broker's data folder`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&f.data, "data", "", "data folder of an agent, whose store is meant")
	cmd.PersistentFlags().StringVar(&f.store, "store", "", "folder of a store")
	for _, c := range []*cobra.Command{
		a.storeBackupCommand(&f), a.storeRestoreCommand(&f), a.storeCheckCommand(&f), a.storeDumpCommand(&f), a.storeRepairCommand(&f),
	} {
		run := c.RunE
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if a.kubeconfig != "" || a.brokerNamed {
				return fmt.Errorf("%s works on a folder: give --data or --store, not --broker or --kubeconfig", cmd.CommandPath())
			}
			return run(cmd, args)
		}
		cmd.AddCommand(c)
	}
	return cmd
}

func (a *app) storeCheckCommand(f *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "check --data DIR",
		Short: "Read all of a store and say what is damaged; exit code 1 if anything is",
		Long: `Read all of a store: the checksum of every block, the logs, the order of the
levels and every record. Nothing is changed. The store must not be in use; check
a backup of one that is (see backup and restore).`,
		Example: `  fairlead store check --data /var/lib/fairlead
  fairlead store check --store /var/lib/fairlead/store.broken-20261122T201500.000000 -o json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			dir, err := f.dir()
			if err != nil {
				return err
			}
			p := a.progress("records read")
			rep, err := store.Check(dir, func(n int) { p.show(n) })
			p.end()
			if err != nil {
				return err
			}
			if err := a.showCheck(rep); err != nil {
				return err
			}
			if n := len(rep.Damage) + rep.MoreDamage; n > 0 {
				return fmt.Errorf("store %s is damaged in %s: `fairlead store repair` saves what can be read", dir, plural(n, "place", "places"))
			}
			return nil
		},
	}
}

func (a *app) showCheck(rep store.Report) error {
	if rep.Damage == nil {
		rep.Damage = []store.Damage{}
	}
	if a.output == "json" {
		return a.json(rep)
	}
	fmt.Fprintf(a.out, "%s: format %d, %s of %s, %s\n", rep.Dir, rep.Format, plural(rep.Tables, "table", "tables"), size(int(rep.TableBytes)), counts(rep.Records))
	for _, d := range rep.Damage {
		fmt.Fprintf(a.out, "DAMAGED  %s: %s\n", d.Where, d.Problem)
	}
	if rep.MoreDamage > 0 {
		fmt.Fprintf(a.out, "DAMAGED  %d places more\n", rep.MoreDamage)
	}
	if len(rep.Damage) == 0 {
		fmt.Fprintln(a.out, "sound")
	}
	return nil
}

// counts lists numbers of records by key space.
func counts(m map[string]int) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if name != "format" {
			parts = append(parts, fmt.Sprintf("%s %d", name, m[name]))
		}
	}
	if len(parts) == 0 {
		return "no records"
	}
	return "records: " + strings.Join(parts, ", ")
}

func (a *app) storeDumpCommand(f *storeFlags) *cobra.Command {
	var space, prefix string
	cmd := &cobra.Command{
		Use:   "dump --data DIR",
		Short: "Print the records of a store, one JSON object per line",
		Long: `Print the records of a store, one JSON object per line, sorted by key space and
key. Payloads are text where they are UTF-8, else {"base64": …}. The key spaces
are ` + strings.Join(store.SpaceNames(), ", ") + `.`,
		Example: `  fairlead store dump --data /var/lib/fairlead --space retained --prefix fl/plant-7/desired/
  fairlead store dump --data /var/lib/fairlead | jq -r .key`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			dir, err := f.dir()
			if err != nil {
				return err
			}
			damaged := 0
			err = store.Dump(dir, space, prefix, func(r store.Record) error {
				if r.Damage != "" {
					damaged++
				}
				return a.line(r)
			})
			if err == nil && damaged > 0 {
				err = fmt.Errorf("%s cannot be decoded", plural(damaged, "record", "records"))
			}
			if errors.Is(err, syscall.EPIPE) {
				return nil // `| head` has seen enough
			}
			return err
		},
	}
	cmd.Flags().StringVar(&space, "space", "", "only this key space")
	cmd.Flags().StringVar(&prefix, "prefix", "", "only keys that begin so, such as the begin of a topic")
	return cmd
}

func (a *app) storeRepairCommand(f *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "repair --data DIR",
		Short: "Build a new store of all that can be read in a damaged one",
		Long: `Build a new store of all records of a damaged one that can be read, and put it in
its place. The damaged one is kept, unchanged, under a new name. What is lost is
said; what the fabric knows of it comes back by digest repair, readings come back
from the mappers. The store must not be in use, and the disk needs room for a
second one.`,
		Example: `  fairlead store repair --data /var/lib/fairlead`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			dir, err := f.dir()
			if err != nil {
				return err
			}
			p := a.progress("records saved")
			rep, err := store.Repair(dir, func(n int) { p.show(n) })
			p.end()
			if err != nil {
				return err
			}
			if rep.Lost == nil {
				rep.Lost = []store.Damage{}
			}
			if a.output == "json" {
				return a.json(rep)
			}
			fmt.Fprintf(a.out, "%s: saved from %s: %s\n", rep.Dir, strings.Join(rep.From, " and "), counts(rep.Salvaged))
			for _, name := range slices.Sorted(maps.Keys(rep.Dropped)) {
				fmt.Fprintf(a.out, "DROPPED  %s: %s could not be decoded\n", name, plural(rep.Dropped[name], "record", "records"))
			}
			for _, l := range rep.Lost {
				fmt.Fprintf(a.out, "LOST     %s: %s\n", l.Where, l.Problem)
			}
			if rep.MoreLost > 0 {
				fmt.Fprintf(a.out, "LOST     %d places more\n", rep.MoreLost)
			}
			fmt.Fprintf(a.out, "the damaged store is kept: %s\n", rep.Kept)
			return nil
		},
	}
}

func (a *app) storeBackupCommand(f *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "backup --data DIR [FILE]",
		Short: "Write a backup of a store, of a running agent too",
		Long: `Write a backup of a store to FILE, or to stdout. A running agent is asked over
its admin socket and goes on working; where none runs, the store is read. The
backup is a tar with a manifest and SHA-256 sums, and is verified while it is
written: FILE is there only if it is whole.`,
		Example: `  fairlead store backup --data /var/lib/fairlead /mnt/usb/plant-7.tar
  fairlead store backup --data /var/lib/fairlead | ssh backup 'cat > plant-7.tar'`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			to := "-"
			if len(args) == 1 {
				to = args[0]
			}
			return a.storeBackup(cmd.Context(), f, to)
		},
	}
}

func (a *app) storeBackup(ctx context.Context, f *storeFlags, to string) error {
	dir, err := f.dir()
	if err != nil {
		return err
	}
	if to == "-" && a.terminal {
		return errors.New("a backup is no text: name a FILE or redirect stdout")
	}
	from, err := a.backupSource(ctx, f.data, dir)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	p := a.progress("bytes")
	defer p.end()
	var m store.BackupManifest
	write := func(out io.Writer) (err error) {
		r := io.TeeReader(from, io.MultiWriter(out, p))
		if m, err = store.VerifyBackup(r); err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r) // the end of the tar
		return err
	}
	if to == "-" {
		if err := write(a.out); err != nil {
			return fmt.Errorf("backup: what was written is not whole: %w", err)
		}
	} else if err := writeWhole(to, write); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	p.end()
	a.note("backup of %s of %s: %s in %s, verified", or(m.Node, "a store"), m.Time.Format(time.RFC3339), size(int(m.Bytes())), plural(len(m.Files), "file", "files"))
	return nil
}

// backupSource asks the agent of a data folder, or reads the store of none.
func (a *app) backupSource(ctx context.Context, data, dir string) (io.ReadCloser, error) {
	if data != "" {
		r, err := a.agentBackup(ctx, data)
		if !errors.Is(err, errNoAgent) {
			return r, err
		}
	}
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(store.BackupClosed(dir, w, nodeOf(filepath.Dir(dir)))) }()
	return r, nil
}

func (a *app) agentBackup(ctx context.Context, data string) (io.ReadCloser, error) {
	socket := adminSocket(data)
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: a.timeout}).DialContext(ctx, "unix", socket)
		},
		ResponseHeaderTimeout: max(a.timeout, time.Minute), // a slow disk copies the logs first
		DisableKeepAlives:     true,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/store/backup", nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%s: %w", socket, errNoAgent)
	case err != nil:
		return nil, fmt.Errorf("agent at %s: %w", socket, root(err))
	case resp.StatusCode != http.StatusOK:
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		_ = resp.Body.Close()
		return nil, fmt.Errorf("agent at %s: %s: %s", socket, resp.Status, strings.TrimSpace(string(b)))
	}
	return resp.Body, nil
}

// nodeOf is the node that a data folder belongs to; empty where it does not say.
func nodeOf(data string) string {
	var id struct {
		Node string `json:"node"`
	}
	b, err := os.ReadFile(filepath.Join(data, "node.json"))
	if err != nil || json.Unmarshal(b, &id) != nil {
		return ""
	}
	return id.Node
}

// writeWhole writes a file that is there only if write succeeds, and is on the
// disk then.
func writeWhole(path string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".part-*") // mode 0600
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

func (a *app) storeRestoreCommand(f *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "restore --data DIR FILE",
		Short: "Make a store of a backup, in a folder that has none",
		Long: `Make a store of the backup FILE, or of stdin for "-". Everything is verified, and
the store is checked, before it gets its name. A store that is there is never
overwritten: stop the agent and move it away first. A data folder of one node
does not take the backup of another.`,
		Example: `  mv /var/lib/fairlead/store /var/lib/fairlead/store.old
  fairlead store restore --data /var/lib/fairlead /mnt/usb/plant-7.tar`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			dir, err := f.dir()
			if err != nil {
				return err
			}
			in := io.ReadCloser(os.Stdin)
			if args[0] != "-" {
				if in, err = a.ownBackup(args[0], f.data); err != nil {
					return err
				}
			}
			defer func() { _ = in.Close() }()
			p := a.progress("bytes")
			m, err := store.Restore(io.TeeReader(in, p), dir)
			p.end()
			if err != nil {
				return err
			}
			a.note("restored %s of %s to %s: %s in %s, verified and checked", or(m.Node, "a store"), m.Time.Format(time.RFC3339), dir, size(int(m.Bytes())), plural(len(m.Files), "file", "files"))
			return nil
		},
	}
}

// ownBackup opens a backup file if it may go into the data folder.
func (a *app) ownBackup(path, data string) (*os.File, error) {
	in, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if node := nodeOf(data); data != "" && node != "" {
		m, err := store.VerifyBackup(in)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", path, err), in.Close())
		}
		if m.Node != node {
			return nil, errors.Join(fmt.Errorf("%s is the backup of node %s, the folder %s is node %s's: restore it into a folder of its own with --store", path, or(m.Node, "(none)"), data, node), in.Close())
		}
		if _, err := in.Seek(0, io.SeekStart); err != nil {
			return nil, errors.Join(err, in.Close())
		}
	}
	return in, nil
}

// progress shows on a terminal how far something is that takes more than a second.
type progress struct {
	out         io.Writer // nil for nobody
	what        string
	n           int
	began, last time.Time
}

func (a *app) progress(what string) *progress {
	p := &progress{what: what, began: time.Now()}
	if f, ok := a.errOut.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.out = f
	}
	return p
}

// Write counts bytes.
func (p *progress) Write(b []byte) (int, error) {
	p.show(p.n + len(b))
	return len(b), nil
}

func (p *progress) show(n int) {
	p.n = n
	now := time.Now()
	if p.out == nil || now.Sub(p.began) < time.Second || now.Sub(p.last) < 200*time.Millisecond {
		return
	}
	p.last = now
	shown := fmt.Sprintf("%d %s", n, p.what)
	if p.what == "bytes" {
		shown = size(n)
	}
	fmt.Fprintf(p.out, "\r%s, %s \x1b[K", shown, span(now.Sub(p.began)))
}

// end takes the line away.
func (p *progress) end() {
	if !p.last.IsZero() {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.last = time.Time{}
	}
}
