// Command fairlead-mapper serves the devices of one node through the protocols
// it knows.
//
//	fairlead-mapper run --bus mqtt://127.0.0.1:1883 --node plant-7
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/mappers/modbus"
)

// version is set by the build: -ldflags "-X main.version=v0.1.0".
var version = ""

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fairlead-mapper:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "fairlead-mapper",
		Short:         "Reads and writes the devices of a Fairlead node",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), buildVersion()) },
	})
	return root
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

func runCommand() *cobra.Command {
	var cfg driver.Config
	var protocols []string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Serve the node's devices until interrupted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Logger = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			return run(cmd.Context(), cfg, protocols)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Bus, "bus", "mqtt://127.0.0.1:1883", "URL of the node's bus: mqtt://host:port, ws://host:port/path or unix:///path")
	f.StringVar(&cfg.Node, "node", "", "name of the edge node")
	f.StringVar(&cfg.Name, "name", "", "the mapper's name on the bus (default: its protocols)")
	f.StringVar(&cfg.TokenFile, "token-file", "", "file with the mapper's token for the bus")
	f.StringSliceVar(&protocols, "protocol", []string{modbus.Protocol}, "protocols to serve; repeatable")
	f.StringVar(&cfg.Metrics, "metrics", "", "address of /metrics, /healthz and /readyz, such as 127.0.0.1:9464 (default: none)")
	f.TextVar(&level, "log-level", slog.LevelInfo, "DEBUG, INFO, WARN or ERROR")
	_ = cmd.MarkFlagRequired("node") // the flag exists
	return cmd
}

func run(ctx context.Context, cfg driver.Config, protocols []string) error {
	drivers := make([]driver.Driver, 0, len(protocols))
	known := map[string]func(*slog.Logger) driver.Driver{modbus.Protocol: modbus.New}
	for _, p := range protocols {
		open := known[p]
		if open == nil {
			return fmt.Errorf("protocol %q is not known or named twice: want %s", p, modbus.Protocol)
		}
		delete(known, p)
		drivers = append(drivers, open(cfg.Logger))
	}
	cfg.Logger.Info("mapper starts", "version", buildVersion(), "bus", cfg.Bus, "protocols", protocols)
	return driver.Run(ctx, cfg, drivers...)
}
