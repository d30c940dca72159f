package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/store"
)

func (a *app) eventsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show the events that wait for the cloud",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var dir string
	backlog := &cobra.Command{
		Use:   "backlog --data DIR",
		Short: "Show how many events wait for the cloud, their size and the oldest one's age",
		Long: `Show what waits in a node's event log, on the node itself. DIR is the agent's data
folder. A running agent is asked; where none runs, its store is read and not
changed.

  EVENTS   events that the cloud does not have yet
  SIZE     of them in the log
  OLDEST   the age of the oldest of them
  DROPPED  events that the log's bounds dropped before them, and of which the
           cloud does not know yet; it gets a gap marker in their place`,
		Example: `  fairlead events backlog --data /var/lib/fairlead
  fairlead events backlog --data /var/lib/fairlead -o json | jq .count`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return errors.New("no data folder: give --data, the agent's")
			}
			if a.kubeconfig != "" || a.brokerNamed {
				return fmt.Errorf("%s reads the data folder of a node: give --data alone", cmd.CommandPath())
			}
			return a.eventBacklog(cmd.Context(), dir)
		},
	}
	backlog.Flags().StringVar(&dir, "data", "", "the agent's data folder")
	cmd.AddCommand(backlog)
	return cmd
}

type backlogRow struct {
	Events  uint64    `json:"count"`
	Bytes   uint64    `json:"bytes"`
	Oldest  time.Time `json:"oldest,omitzero"`
	Dropped uint64    `json:"dropped"`
}

func (a *app) eventBacklog(ctx context.Context, dir string) error {
	var l broker.EventBacklog
	err := a.askAgent(ctx, dir, "/events/backlog", &l)
	if errors.Is(err, errNoAgent) {
		l, err = broker.ReadEventBacklog(filepath.Join(dir, "store"))
		if errors.Is(err, store.ErrInUse) {
			err = fmt.Errorf("%w; it does not listen at %s", err, adminSocket(dir))
		}
	}
	if err != nil {
		return err
	}
	r := backlogRow{Events: l.Count, Bytes: l.Bytes, Oldest: millis(l.Oldest), Dropped: l.Dropped}
	if a.output == "json" {
		return a.json(r)
	}
	return a.table("", []string{"EVENTS", "SIZE", "OLDEST", "DROPPED"},
		[][]string{{strconv.FormatUint(r.Events, 10), size(int(r.Bytes)), a.age(r.Oldest), strconv.FormatUint(r.Dropped, 10)}})
}

// errNoAgent says that no agent listens in the data folder.
var errNoAgent = errors.New("no agent is running")

func adminSocket(dir string) string { return filepath.Join(dir, "admin.sock") }

// maxAnswer bounds what is read of an agent's answer.
const maxAnswer = 1 << 20

// askAgent gets a JSON answer from the agent whose data folder this is.
func (a *app) askAgent(ctx context.Context, dir, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	socket := adminSocket(dir)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s: %w", socket, errNoAgent)
	case err != nil:
		return fmt.Errorf("agent at %s: %w", socket, root(err))
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	switch {
	case err != nil:
		return fmt.Errorf("agent at %s: %w", socket, err)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("agent at %s: %s: %s", socket, resp.Status, strings.TrimSpace(string(b)))
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("agent at %s: %w", socket, err)
	}
	return nil
}
