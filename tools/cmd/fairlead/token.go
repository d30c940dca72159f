package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/cloudbridge/token"
)

func (a *app) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make, list and revoke the nodes' credentials (--kubeconfig)",
		Long: `A node logs in to the cloud broker with its name and a token. The cluster holds
a hash of the token only: it is shown once, when it is made.`,
	}
	cmd.AddCommand(a.tokenCreateCommand(), a.tokenListCommand(), a.tokenRevokeCommand())
	return cmd
}

// tokens runs a command on the cluster's tokens, within the timeout.
func (a *app) tokens(ctx context.Context, do func(context.Context, token.Store) error) error {
	k, cfg, err := a.kube()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	return a.kubeError(cfg, do(ctx, token.Store{Kube: k}))
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var node string
	var force bool
	cmd := &cobra.Command{
		Use:   "create --node NODE",
		Short: "Make a node's token; it is the only thing on stdout",
		Example: `  fairlead token create --node plant-7 --kubeconfig cluster.kubeconfig > plant-7.token
  fairlead token create --node plant-7 --force --kubeconfig cluster.kubeconfig > plant-7.token`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.tokens(cmd.Context(), func(ctx context.Context, s token.Store) error {
				create := s.Create
				if force {
					create = s.Rotate
				}
				t, err := create(ctx, node)
				if errors.Is(err, token.ErrExists) {
					return fmt.Errorf("%w with --force", err)
				}
				if err != nil {
					return err
				}
				if _, err := fmt.Fprintln(a.out, t); err != nil {
					return err
				}
				fmt.Fprintf(a.errOut, "This token is shown once. On the node put it into a file that only its owner can read, and start\n  fairlead-edge run --node %s --data DIR --cloud URL --token-file FILE\n", node)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "name of the node")
	cmd.Flags().BoolVar(&force, "force", false, "replace a token that there is; the old one stops working at the node's next connect")
	_ = cmd.MarkFlagRequired("node") // the flag exists
	return cmd
}

type tokenRow struct {
	Node    string    `json:"node"`
	Created time.Time `json:"created"`
	Rotated time.Time `json:"rotated,omitzero"`
}

func (a *app) tokenListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the nodes that have a token",
		Long: `List the nodes that have a token. CREATED is the age of the first one, ROTATED
that of the present one where it replaced another.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.tokens(cmd.Context(), func(ctx context.Context, s token.Store) error {
				list, err := s.List(ctx)
				if err != nil {
					return err
				}
				rows := make([]tokenRow, len(list))
				text := make([][]string, len(list))
				for i, e := range list {
					rows[i] = tokenRow(e)
					text[i] = []string{e.Node, a.age(e.Created), a.age(e.Rotated)}
				}
				if a.output == "json" {
					return a.json(rows)
				}
				return a.table("no node has a token", []string{"NODE", "CREATED", "ROTATED"}, text)
			})
		},
	}
}

func (a *app) tokenRevokeCommand() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use:   "revoke --node NODE",
		Short: "Remove a node's token: its next connect is refused",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.tokens(cmd.Context(), func(ctx context.Context, s token.Store) error {
				if err := s.Revoke(ctx, node); err != nil {
					return err
				}
				fmt.Fprintf(a.errOut, "token of node %s revoked: its next connect is refused\n", node)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "name of the node")
	_ = cmd.MarkFlagRequired("node") // the flag exists
	return cmd
}
