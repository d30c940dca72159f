// Command modbussim is a pump station on Modbus TCP for the demo; see
// tools/modbussim/README.md. SIGUSR1 makes it stop and start answering.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/tools/modbussim"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "modbussim:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var listen string
	var seed uint64
	cmd := &cobra.Command{
		Use:           "modbussim",
		Short:         "A pump station on Modbus TCP; SIGUSR1 makes it stop and start answering",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), listen, seed) },
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:5020", "host:port; port 0 takes a free one")
	cmd.Flags().Uint64Var(&seed, "seed", 1, "of the values' noise")
	return cmd
}

func run(ctx context.Context, listen string, seed uint64) error {
	s, err := modbussim.Listen(listen, modbussim.NewPlant(seed))
	if err != nil {
		return fmt.Errorf("%w; choose another with --listen", err)
	}
	toggle := make(chan os.Signal, 1)
	signal.Notify(toggle, syscall.SIGUSR1)
	defer signal.Stop(toggle)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-toggle:
				if s.ToggleStall() {
					fmt.Println("not answering")
				} else {
					fmt.Println("answering again")
				}
			}
		}
	})
	fmt.Println("listening on", s.Addr())
	return s.Serve(ctx)
}
